"""Files that are on the disk when they are closed, and that say why when they cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch


class _Writer:
    """What `torch.save` needs of a file. Remembers why a write failed: torch only says that one did."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def durable_file(path: Path) -> Iterator[Any]:
    """A new file to write to, whose content is on the disk at the end of the block.

    Raises:
        OSError: the true reason if writing fails, also where torch hides it.
    """
    file = open(path, "wb")  # noqa: SIM115  # closed below, where a second failure must not hide the first
    writer = _Writer(file)
    try:
        yield writer
        file.flush()
        os.fsync(file.fileno())
    except Exception as error:
        with suppress(OSError):  # what could not be written cannot be flushed either
            file.close()
        if writer.failure is not None:
            raise writer.failure from error
        raise
    file.close()


def save_torch_file(state: Any, path: Path) -> None:
    """`torch.save` that has reached the disk when it returns."""
    with durable_file(path) as file:
        torch.save(state, file)
