"""Reading JSON-lines files in blocks of whole lines, and saying where in them something is wrong."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"


class InputError(ValueError):
    """Something is wrong in an input file; the message starts with file, line and column."""


@dataclass(frozen=True)
class LineBlock:
    """Consecutive whole lines of a file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes

    def records(self, keys: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and object of each line that is not blank, each with all of the `keys`."""
        for i, line in enumerate(self._text().split("\n")):
            if line and not line.isspace():
                number = self.first_line + i
                yield number, self._parse(line, number, keys)

    def error(self, line: int, message: str, column: int | None = None) -> InputError:
        """The error to raise for a line."""
        place = f"{self.path}:{line}" if column is None else f"{self.path}:{line}:{column}"
        return InputError(f"{place}: {message}")

    def _text(self) -> str:
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.first_line + self.data.count(b"\n", 0, error.start)
            column = error.start - self.data.rfind(b"\n", 0, error.start)
            found = self.data[error.start : error.start + 1].hex()
            message = f"invalid UTF-8: byte 0x{found} ({error.reason})"
            raise self.error(line, message, column) from None

    def _parse(self, line: str, number: int, keys: list[str]) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise self.error(number, f"invalid JSON: {error.msg}", error.colno) from None
        except RecursionError:
            raise self.error(number, "invalid JSON: nested too deeply") from None
        if not isinstance(record, dict):
            raise self.error(number, f"expected a JSON object, found {_kind(record)}")
        for key in keys:
            if key not in record:
                present = ", ".join(map(repr, record)) or "none"
                raise self.error(number, f"no key {key!r}; the keys of this line: {present}")
        return record


def texts_of(block: LineBlock, line: int, key: str, value: Any) -> list[str]:
    """The sentences in a record: a string is one, a list of strings is several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise block.error(line, f"{key!r} must be a string or a list of strings, found {_kind(value)}")
    for text in texts:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = ord(text[error.start])
                raise block.error(line, f"{key!r} has half of a surrogate pair, \\u{found:04x}") from None
    return texts


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class InputFiles:
    """One or several JSON-lines files, plain or gzip-compressed, read in order.

    Args:
        pattern: path of a file, or a pattern such as `data/*.jsonl`, whose files are taken in sorted order.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not self.paths:
            raise FileNotFoundError(f"no input file {pattern}")
        for path in self.paths:
            if os.path.isdir(path):
                raise IsADirectoryError(f"the input {path} is a directory: give a file or a pattern ({path}/*)")
        self.num_bytes = sum(os.path.getsize(path) for path in self.paths)
        self.num_bytes_read = 0
        """Bytes of the files read so far, as they lie on the disk; 0 for a pipe."""

    def newest(self) -> float:
        """Time of the last change of any of the files."""
        return max(Path(path).stat().st_mtime for path in self.paths)

    def blocks(self) -> Iterator[LineBlock]:
        """All lines, in blocks."""
        self.num_bytes_read = 0
        for path in self.paths:
            done = self.num_bytes_read
            with open(path, "rb") as raw:
                is_gzip = raw.peek(2)[:2] == _GZIP_MAGIC
                stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
                line = 1
                while data := self._read_block(path, line, stream):
                    if raw.seekable():  # a pipe has no position
                        self.num_bytes_read = done + raw.tell()
                    yield LineBlock(path, line, data)
                    line += data.count(b"\n")

    @staticmethod
    def _read_block(path: str, line: int, stream: Any) -> bytes:
        try:
            data = stream.read(_BLOCK_BYTES)
            return data if data.endswith(b"\n") else data + stream.readline()
        except (EOFError, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: damaged gzip file after line {line}: {error}") from None
