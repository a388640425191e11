"""New files whose content is on the disk when they are closed."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checksum import BLOCK, Checksum

BUFFER_BYTES = 8 * BLOCK
"""What a file keeps in memory before it writes."""
_SECTOR = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to be whole."""

    size: int
    checksum: str


class DurableFile:
    """A new file; `close` returns after the disk has it.

    The page cache is passed by (O_DIRECT) where the file system allows it and the file is larger than the buffer:
    otherwise saving drives out of the cache what the run reads, and each byte costs a second copy.

    Raises:
        OSError: what a write, the flush or the opening failed with; from then on the file is not to be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._memory = mmap.mmap(-1, BUFFER_BYTES)  # page-aligned, as O_DIRECT demands
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._filled = 0
        self._direct = False
        self._checksum = Checksum()
        self.failure: OSError | None = None
        """Why a write failed, for callers that hide it."""

    def write(self, data: Any) -> int:
        """Take the bytes of any buffer; returns their number."""
        source = np.frombuffer(data, np.uint8)
        position = 0
        while position < len(source):
            count = min(len(source) - position, BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = source[position : position + count]
            self._filled += count
            position += count
            if self._filled == BUFFER_BYTES:
                self._write_buffer()
        return len(source)

    def tell(self) -> int:
        """Number of bytes so far."""
        return self._checksum.num_bytes + self._filled

    def flush(self) -> None:
        """Nothing: what is in the buffer is written at the latest by `close`."""

    def _write_buffer(self) -> None:
        if self._checksum.num_bytes == 0 and self._filled == BUFFER_BYTES:
            self._direct = self._set_direct(True)
        data = memoryview(self._memory)[: self._filled]
        self._checksum.update(data)
        if self._direct and self._filled % _SECTOR:
            self._direct = self._set_direct(False)
        try:
            while len(data):
                data = data[self._write(data) :]
        except OSError as error:
            self.failure = error
            error.filename = error.filename or str(self.path)
            raise
        self._filled = 0

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._file, data)
        except OSError:
            if not self._direct:
                raise
            self._direct = self._set_direct(False)  # the file system took the flag, but not the write
            return os.write(self._file, data)

    def _set_direct(self, on: bool) -> bool:
        """Switch O_DIRECT; returns whether it is on."""
        if not _DIRECT:
            return False
        import fcntl

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (_DIRECT if on else 0))
        except OSError:
            return False
        return on

    def close(self) -> FileRecord:
        """Bring all of it to the disk."""
        try:
            if self._filled:
                self._write_buffer()
            os.fsync(self._file)
        finally:
            self._release()
        return FileRecord(self._checksum.num_bytes, self._checksum.hexdigest())

    def abandon(self) -> None:
        """Close without a promise about the content."""
        with contextlib.suppress(OSError):
            self._release()

    def _release(self) -> None:
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            os.close(descriptor)


@contextmanager
def durable_file(path: str | Path) -> Iterator[tuple[DurableFile, list[FileRecord]]]:
    """(a new file to write to, a list that holds its record after the block).

    Raises:
        OSError: the true reason if writing fails, also where the writer hides it.
    """
    file = DurableFile(path)
    record: list[FileRecord] = []
    try:
        yield file, record
        record.append(file.close())
    except BaseException as error:
        file.abandon()
        if file.failure is not None and error is not file.failure:
            raise file.failure from error
        raise


def write_durably(path: str | Path, segments: Iterable[Any]) -> FileRecord:
    """Write a file of the bytes of several buffers, one after the other."""
    with durable_file(path) as (file, record):
        for segment in segments:
            file.write(segment)
    return record[0]


def replace_durably(path: str | Path, content: bytes) -> FileRecord:
    """Write a small file that is there as a whole or not at all; `sync_directory` makes it stay."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    record = write_durably(partial, [content])
    os.replace(partial, path)
    return record


def sync_directory(path: str | Path) -> None:
    """Bring the entries of a directory (names, not contents) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
