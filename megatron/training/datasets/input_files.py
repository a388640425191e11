"""Finding input files, opening them whatever their compression, and reading them in blocks."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron.training.datasets.json_lines import InputError, LineBlock, error_at, texts_of
from megatron.training.datasets.long_lines import LongLine

_BLOCK_BYTES = 1 << 19
_LONG_LINE_BYTES = 1 << 22
_PARQUET_ROWS = 1 << 10
_ZSTD_BYTES = 1 << 13  # that may become many times as much

STANDARD_INPUT = "-"
_EXTENSIONS = (".jsonl", ".json", ".ndjson", ".parquet")
_COMPRESSIONS = (".gz", ".zst", "")
_GZIP_MAGIC, _ZSTD_MAGIC, _PARQUET_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a Parquet file: the values of some columns."""

    path: str
    first_line: int
    """Number of the first row, counted from 1."""
    columns: dict[str, list[Any]]

    @property
    def num_bytes(self) -> int:
        return sum(len(value) for values in self.columns.values() for value in values if value is not None)

    def lines(self) -> Iterator[bytes]:
        """Each row as a line of JSON."""
        for row in zip(*self.columns.values()):
            yield json.dumps(dict(zip(self.columns, row)), ensure_ascii=False).encode("utf-8") + b"\n"

    def records(self, keys: list[str], bad_lines: list[str] | None) -> Iterator[tuple[int, dict[str, list[str]]]]:
        """As `LineBlock.records`, by rows."""
        for number, row in enumerate(zip(*(self.columns[key] for key in keys)), self.first_line):
            try:
                yield number, {key: texts_of(self.path, number, key, value) for key, value in zip(keys, row)}
            except InputError as error:
                if bad_lines is None:
                    raise
                bad_lines.append(str(error))


Block = LineBlock | LongLine | RowBlock


def find_input(inputs: str | list[str]) -> list[str]:
    """The files that paths, patterns and folders stand for, in order; those of one pattern or folder sorted.

    Raises:
        FileNotFoundError: one of them stands for no file.
    """
    return [path for given in ([inputs] if isinstance(inputs, str) else inputs) for path in _files_of(given)]


def _files_of(given: str) -> list[str]:
    if given == STANDARD_INPUT:
        return [given]
    if os.path.isdir(given):
        endings = tuple(extension + compression for extension in _EXTENSIONS for compression in _COMPRESSIONS)
        found = sorted(str(path) for path in Path(given).rglob("*") if path.is_file() and path.name.endswith(endings))
        if not found:
            raise FileNotFoundError(f"the folder {given} holds no file that ends with {', '.join(_EXTENSIONS)}")
        return found
    found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    found = [path for path in found if not os.path.isdir(path)]
    if not found:
        raise FileNotFoundError(f"no input file {given}")
    return found


class InputFiles:
    """Files of JSON lines or Parquet rows, plain or compressed, read in order.

    Args:
        inputs: paths, patterns such as `data/*.jsonl`, folders, or "-" for standard input.
        keys: the columns to read from Parquet files.
        scratch: start of the names of files for long lines that come out of a pipe or a compressed file; each is
            removed when the next block is asked for.
    """

    def __init__(self, inputs: str | list[str], keys: list[str] | None = None, scratch: str | None = None) -> None:
        self.paths = find_input(inputs)
        self.keys = ["text"] if keys is None else keys
        self.num_bytes = sum(os.path.getsize(path) for path in self.paths if path != STANDARD_INPUT)
        self.num_bytes_read = 0
        """Bytes of the files read so far, as they lie on the disk; 0 for a pipe."""
        self._scratch = scratch
        self._num_long_lines = 0

    def newest(self) -> float:
        """Time of the last change of any of the files; for standard input, which may be new at any time, never."""
        times = [os.path.getmtime(path) for path in self.paths if path != STANDARD_INPUT]
        return max(times) if len(times) == len(self.paths) else float("inf")

    def blocks(self) -> Iterator[Block]:
        """All lines and rows, in blocks."""
        self.num_bytes_read = 0
        for path in self.paths:
            before = self.num_bytes_read
            with ExitStack() as stack:
                raw: BinaryIO = sys.stdin.buffer if path == STANDARD_INPUT else stack.enter_context(open(path, "rb"))
                for block in self._blocks_of(path, raw):
                    if raw is not sys.stdin.buffer and raw.seekable():  # a pipe has no position
                        self.num_bytes_read = before + raw.tell()
                    yield block

    def _blocks_of(self, path: str, raw: BinaryIO) -> Iterator[Block]:
        magic = raw.peek(4)[:4]  # type: ignore[attr-defined]
        name = "standard input" if path == STANDARD_INPUT else path
        if magic == _PARQUET_MAGIC:
            return _read_rows(path, self.keys)
        if magic[:2] == _GZIP_MAGIC:
            return self._read_lines(name, gzip.GzipFile(fileobj=raw), None)
        if magic == _ZSTD_MAGIC:
            return self._read_lines(name, _open_zstd(raw), None)
        return self._read_lines(name, raw, path if raw.seekable() and path != STANDARD_INPUT else None)

    def _read_lines(self, path: str, stream: Any, seekable: str | None) -> Iterator[Block]:
        """Blocks of a stream; `seekable` is the file that holds it as it is, if any."""
        line = 1
        while data := _read(path, line, stream, lambda: stream.read(_BLOCK_BYTES)):
            if not data.endswith(b"\n"):
                data += _read(path, line, stream, lambda: stream.readline(_LONG_LINE_BYTES))
            rest = b"" if data.endswith(b"\n") else data[data.rfind(b"\n") + 1 :]
            if len(rest) < _LONG_LINE_BYTES:
                rest = b""  # the last line, without a newline
            if whole := data[: len(data) - len(rest)]:
                yield LineBlock(path, line, whole)
                line += whole.count(b"\n")
            if rest:
                yield from self._long_line(path, line, stream, rest, seekable)
                line += 1

    def _long_line(self, path: str, line: int, stream: Any, start: bytes, seekable: str | None) -> Iterator[LongLine]:
        """A long line where it lies, or else copied to a file."""
        pieces = _rest_of_line(path, line, stream)
        if seekable is not None:
            offset = stream.tell() - len(start)
            num_bytes = len(start) + sum(map(len, pieces))
            yield LongLine(path, line, seekable, offset, num_bytes)
            return
        if self._scratch is None:
            raise InputError(f"{path}:{line}: a line of more than {_LONG_LINE_BYTES} bytes")
        self._num_long_lines += 1
        file = f"{self._scratch}_line_{self._num_long_lines}.partial"
        num_bytes = _write_pieces(file, [start], pieces)
        yield LongLine(path, line, file, 0, num_bytes)

    def forget(self, block: Block) -> None:
        """Remove what was kept of a block elsewhere, once it is done with."""
        if isinstance(block, LongLine) and block.file != block.path:
            Path(block.file).unlink(missing_ok=True)


def _rest_of_line(path: str, line: int, stream: Any) -> Iterator[bytes]:
    while piece := _read(path, line, stream, lambda: stream.readline(_BLOCK_BYTES)):
        yield piece
        if piece.endswith(b"\n"):
            return


def _write_pieces(file: str, *sources: Iterable[bytes]) -> int:
    with open(file, "wb") as output:
        for source in sources:
            for piece in source:
                output.write(piece)
        return output.tell()


def _read(path: str, line: int, stream: Any, read: Any) -> bytes:
    try:
        return read()
    except Exception as error:
        kind = "gzip" if isinstance(stream, gzip.GzipFile) else "zstd"
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)) or type(error).__name__ == "ZstdError":
            raise InputError(f"{path}: damaged {kind} file after line {line}: {error}") from None
        raise


def _open_zstd(raw: BinaryIO) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise RuntimeError("input compressed with zstd needs the package zstandard: pip install zstandard") from error
    return io.BufferedReader(_ZstdStream(raw, zstandard.ZstdDecompressor()))


class _ZstdStream(io.RawIOBase):
    """The content of zstd frames; other than the library's own reader, it notices when the last one is cut off."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame = decompressor.decompressobj()
        self._is_within_frame = False
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._compressed or self._raw.read(_ZSTD_BYTES)
            if not data:
                if self._is_within_frame:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._content = self._frame.decompress(data)
            self._is_within_frame = not self._frame.eof
            self._compressed = self._frame.unused_data
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _read_rows(path: str, keys: list[str]) -> Iterator[RowBlock]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError("input in Parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                names = ", ".join(map(repr, file.schema_arrow.names))
                raise error_at(path, 1, f"no column {missing[0]!r}; the columns of this file: {names}")
            row = 1
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=keys, use_threads=False):
                yield RowBlock(path, row, {key: batch.column(key).to_pylist() for key in keys})
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: damaged Parquet file: {error}") from None
