"""Index arrays kept in files, so that only one process builds them and later runs find them."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy

logger = logging.getLogger(__name__)

DESCRIPTION = "description.txt"


class IndexCache:
    """The files `<directory>/<name>-<array>.npy` of one index, and `<name>-description.txt`.

    Every file appears under its name only when it is complete, so readers never see half of one.

    Args:
        directory: where the files lie; None: nothing is kept.
        name: first part of the file names.
        description: what the index was built from.
    """

    def __init__(self, directory: str | None, name: str, description: str) -> None:
        self.directory = None if directory is None else Path(directory)
        self.name = name
        self.description = description

    def path(self, suffix: str) -> Path:
        """Path of one file of the index."""
        assert self.directory is not None
        return self.directory / f"{self.name}-{suffix}"

    def load_or_build(
        self,
        array_names: tuple[str, ...],
        check: Callable[[dict[str, numpy.ndarray]], str | None],
        build: Callable[[], dict[str, numpy.ndarray]],
    ) -> tuple[dict[str, numpy.ndarray], bool]:
        """The arrays, memory-mapped from the files if these are there and pass `check`, otherwise built and
        kept.

        Args:
            check: says what is wrong with loaded arrays, None if nothing is.

        Returns:
            The arrays by name, and whether they were built.
        """
        arrays = self._load(array_names, check)
        if arrays is not None:
            return arrays, False
        arrays = build()
        self._save(arrays)
        return arrays, True

    def _load(
        self, array_names: tuple[str, ...], check: Callable[[dict[str, numpy.ndarray]], str | None]
    ) -> dict[str, numpy.ndarray] | None:
        if self.directory is None:
            return None
        paths = {name: self.path(f"{name}.npy") for name in array_names}
        if not all(path.is_file() for path in (self.path(DESCRIPTION), *paths.values())):
            return None
        try:
            arrays = {name: numpy.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
            described = self.path(DESCRIPTION).read_text(encoding="utf-8")
            problem = check(arrays) if described == self.description else "it describes another index"
        except (OSError, ValueError, EOFError) as error:
            problem = f"it cannot be read ({error})"
        if problem is None:
            return arrays
        logger.warning("index cache %s is built again: %s", self.path("*"), problem)
        return None

    def _save(self, arrays: dict[str, numpy.ndarray]) -> None:
        if self.directory is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with _replaced(self.path(DESCRIPTION)) as file:
                file.write(self.description.encode("utf-8"))
            for name, array in arrays.items():
                with _replaced(self.path(f"{name}.npy")) as file:
                    numpy.save(file, array, allow_pickle=False)
        except OSError as error:
            logger.warning(
                "index cache cannot be written to %s (%s): every process builds its own; "
                "--data-cache-path names a writable directory",
                self.directory,
                error,
            )


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_array(name: str, array: numpy.ndarray, dtype: type[numpy.number], shape: tuple[int, ...]) -> str | None:
    """What is wrong with an array's type or shape, None if nothing is."""
    if array.dtype == dtype and array.shape == shape:
        return None
    return f"{name} is {array.dtype}{list(array.shape)}, expected {numpy.dtype(dtype)}{list(shape)}"
