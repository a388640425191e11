"""A line of JSON too long to be held in memory: its long strings are read piece by piece.

First the line is reduced: every string of more than `_LONG_STRING` bytes becomes a short stand-in, and what is left is
parsed as usual, so that exactly the lines that are JSON pass. Then the strings asked for are decoded from the file.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.training.datasets.json_lines import InputError, error_at, kind_of, texts_of, values_of

_LONG_STRING = 1 << 16
_PIECE_BYTES = 1 << 20

_QUOTE_OR_ESCAPE = re.compile(rb'\\.|"', re.DOTALL)
# Whole letters and escapes of a JSON string; the two halves of a surrogate pair are one.
_WHOLE_UNITS = re.compile(
    r"(?:[^\\]+|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*"
)
_WHOLE_ESCAPES = re.compile(r"(?:[^\\]+|\\[^u]|\\u[0-9a-fA-F]{4})*")
_LONGEST_UNIT = 12


@dataclass(frozen=True)
class Span:
    """Where the content of a long string lies in the file."""

    begin: int
    end: int


@dataclass(frozen=True)
class LongLine:
    """One line of `num_bytes` bytes from byte `offset` of `file` on; `path` and `first_line` name it to the user."""

    path: str
    first_line: int
    file: str
    offset: int
    num_bytes: int

    def lines(self) -> Iterator[bytes]:
        """The line in pieces, the last of which ends with a newline."""
        ends_with_newline = False
        for piece in self._read(self.offset, self.offset + self.num_bytes):
            yield piece
            ends_with_newline = piece.endswith(b"\n")
        if not ends_with_newline:
            yield b"\n"

    def values(self, keys: list[str]) -> dict[str, list[str | Span]]:
        """The sentences under each key: short ones as they are, long ones as their place.

        Raises:
            InputError: as for other lines; all of the line is checked.
        """
        reduced, spans, stand_in = self._reduce()
        try:
            record = json.loads(reduced.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self.error(f"invalid UTF-8 ({error.reason})") from None
        except RecursionError:
            raise self.error("invalid JSON: nested too deeply") from None
        except ValueError as error:
            raise self.error(f"invalid JSON: {getattr(error, 'msg', error)}") from None

        def restored(value: Any) -> str | Span | Any:
            if isinstance(value, str) and value.startswith(stand_in):
                return spans[int(value.removeprefix(stand_in))]
            return value

        found: dict[str, list[str | Span]] = {}
        for key, value in values_of(self.path, self.first_line, record, keys).items():
            short = value if isinstance(value, list) else [value]
            if not isinstance(value, (str, list)):
                raise self.error(f"{key!r} must be a string or a list of strings, found {kind_of(value)}")
            texts_of(self.path, self.first_line, key, short)
            found[key] = [restored(text) for text in short]
        wanted = {text: key for key, texts in found.items() for text in texts if isinstance(text, Span)}
        for span in spans:
            for _ in self.decode(span, wanted.get(span)):
                pass  # only the check
        return found

    def decode(self, span: Span, key: str | None) -> Iterator[str]:
        """A long string, in pieces.

        Args:
            key: what it stands under. None: nobody wants it, so that halves of surrogate pairs do no harm.
        """
        whole_units = _WHOLE_ESCAPES if key is None else _WHOLE_UNITS
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest = ""
        for data in self._read(span.begin, span.end):
            try:
                text = rest + decoder.decode(data)
            except UnicodeDecodeError as error:
                raise self.error(f"invalid UTF-8 ({error.reason})") from None
            match = whole_units.match(text)
            assert match is not None  # it matches nothing, too
            rest = text[match.end() :]
            if len(rest) >= _LONGEST_UNIT:
                raise self._unit_error(rest, key)
            yield self._unescape(match.group(), key)
        if rest:
            raise self._unit_error(rest, key)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self.error(f"invalid UTF-8 ({error.reason})") from None

    def error(self, message: str) -> InputError:
        """The error to raise for this line."""
        return error_at(self.path, self.first_line, message)

    def _unescape(self, content: str, key: str | None) -> str:
        try:
            text = json.loads(f'"{content}"')
        except json.JSONDecodeError as error:
            raise self.error(f"invalid JSON: {error.msg}") from None
        return text if key is None else texts_of(self.path, self.first_line, key, text)[0]

    def _unit_error(self, rest: str, key: str | None) -> InputError:
        if re.match(r"\\u[dD][89abAB][0-9a-fA-F]{2}", rest):
            return self.error(f"{key!r} has half of a surrogate pair, {rest[:6]}")
        return self.error("invalid JSON: Invalid \\escape")

    def _reduce(self) -> tuple[bytes, list[Span], str]:
        """The line with stand-ins for its long strings, their places, and what a stand-in begins with."""
        stand_in = f"long string {os.urandom(16).hex()} "
        kept, spans = bytearray(), list[Span]()
        opened: int | None = None  # where in the file the content of the open string begins
        kept_before = 0  # what was kept when it was opened
        for position, data in self._whole_escapes():
            done = 0
            for match in _QUOTE_OR_ESCAPE.finditer(data):
                if match.group() != b'"':
                    continue
                kept += data[done : match.start()]
                done = match.start()
                here = position + done
                if opened is None:
                    opened, kept_before = here + 1, len(kept)
                elif here - opened > _LONG_STRING:
                    kept[kept_before:] = b'"' + f"{stand_in}{len(spans)}".encode()
                    spans.append(Span(opened, here))
                    opened = None
                else:
                    opened = None
            kept += data[done:]
            if opened is not None and len(kept) - kept_before > _LONG_STRING + 1:
                del kept[kept_before + _LONG_STRING + 1 :]  # enough to see that the string is long
        return bytes(kept), spans, stand_in

    def _whole_escapes(self) -> Iterator[tuple[int, bytes]]:
        """Pieces of the line with their positions; none ends between a backslash and what it escapes."""
        position, rest = self.offset, b""
        for piece in self._read(self.offset, self.offset + self.num_bytes):
            data = rest + piece
            backslashes = len(data) - len(data.rstrip(b"\\"))
            rest = data[len(data) - backslashes % 2 :]
            yield position, data[: len(data) - len(rest)]
            position += len(data) - len(rest)
        if rest:
            yield position, rest

    def _read(self, begin: int, end: int) -> Iterator[bytes]:
        with open(self.file, "rb") as file:
            file.seek(begin)
            while begin < end:
                piece = file.read(min(_PIECE_BYTES, end - begin))
                if not piece:
                    raise self.error(f"{self.file} ended while it was read")
                begin += len(piece)
                yield piece
