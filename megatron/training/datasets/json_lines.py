"""Blocks of JSON lines: the objects in them, and what is wrong where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """Something is wrong in an input file; the message starts with file, line and column."""


@dataclass(frozen=True)
class LineBlock:
    """Consecutive whole lines of a file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def lines(self) -> Iterator[bytes]:
        """Each line, ending with a newline; carriage returns end no line."""
        for line in self.data.removesuffix(b"\n").split(b"\n"):
            yield line + b"\n"

    def records(self, keys: list[str], bad_lines: list[str] | None) -> Iterator[tuple[int, dict[str, list[str]]]]:
        """Number and texts of each line that is not blank, with all of the `keys`.

        Args:
            bad_lines: a line that cannot be used is left out and described here. None: it raises InputError.
        """
        try:
            texts: list[Any] = self.data.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            texts = self.data.split(b"\n")  # one by one, to see which it is
        for number, line in enumerate(texts, self.first_line):
            if not line or line.isspace():
                continue
            try:
                yield number, self._parse(line, number, keys)
            except InputError as error:
                if bad_lines is None:
                    raise
                bad_lines.append(str(error))

    def error(self, line: int, message: str, column: int | None = None) -> InputError:
        """The error to raise for a line."""
        return error_at(self.path, line, message, column)

    def _parse(self, line: str | bytes, number: int, keys: list[str]) -> dict[str, list[str]]:
        if isinstance(line, bytes):
            try:
                line = line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"invalid UTF-8: byte 0x{line[error.start]:02x} ({error.reason})"
                raise self.error(number, message, error.start + 1) from None
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise self.error(number, f"invalid JSON: {error.msg}", error.colno) from None
        except RecursionError:
            raise self.error(number, "invalid JSON: nested too deeply") from None
        except ValueError as error:  # a number of too many digits
            raise self.error(number, f"invalid JSON: {error}") from None
        values = values_of(self.path, number, record, keys)
        return {key: texts_of(self.path, number, key, value) for key, value in values.items()}


def error_at(path: str, line: int, message: str, column: int | None = None) -> InputError:
    """The error of a line."""
    place = f"{path}:{line}" if column is None else f"{path}:{line}:{column}"
    return InputError(f"{place}: {message}")


def values_of(path: str, line: int, record: Any, keys: list[str]) -> dict[str, Any]:
    """What stands under the keys of a parsed line."""
    if not isinstance(record, dict):
        raise error_at(path, line, f"expected a JSON object, found {kind_of(record)}")
    for key in keys:
        if key not in record:
            present = ", ".join(repr(name[:100]) for name in record) or "none"
            raise error_at(path, line, f"no key {key!r}; the keys of this line: {present}")
    return {key: record[key] for key in keys}


def texts_of(path: str, line: int, key: str, value: Any) -> list[str]:
    """The sentences in a value: a string is one, a list of strings is several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise error_at(path, line, f"{key!r} must be a string or a list of strings, found {kind_of(value)}")
    for text in texts:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = ord(text[error.start])
                raise error_at(path, line, f"{key!r} has half of a surrogate pair, \\u{found:04x}") from None
    return texts


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
