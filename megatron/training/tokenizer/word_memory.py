"""Ids of texts out of the remembered ids of their words."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable

import numpy

EncodeEach = Callable[[list[str]], list[list[int]]]
_REMEMBERED_CHARACTERS = 1 << 21  # of words: some 50 MB
_END = "\x02"  # a word of no ids, which ends a text
_RUN_OR_SIGN = re.compile(r"[A-Za-z0-9]+|[!-~\x02]")
_ODD = re.compile(r"[^ -~\x02]+")


class WordMemory:
    """Encodes texts whose ids are those of their words, one after another, as in prose most words come again.

    Words are runs of ASCII letters and digits, single ASCII signs, and whatever stands between blanks or newlines and
    has another character. The tokenizer must divide texts there, too.

    Args:
        encode: the ids of each of some texts.
        encode_ascii: the same for runs and signs alone.
    """

    def __init__(self, encode: EncodeEach, encode_ascii: EncodeEach) -> None:
        self._encode, self._encode_ascii = encode, encode_ascii
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, int] = {_END: 0}
        self._starts, self._lengths, self._ids = array("q", [0]), array("q", [0]), array("I")
        self._num_characters = 0

    def tokenize(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """All ids in a row, uint32, and how many each text has."""
        joined = f" {_END} ".join(texts)
        if joined.count(_END) >= len(texts):  # some text has this character, or there is none
            encoded = self._encode(texts)
            ids = [token for found in encoded for token in found]
            return numpy.array(ids, numpy.uint32), numpy.array([len(found) for found in encoded], numpy.int64)
        words = _words_of(joined.replace("\n", " "))
        words.append(_END)
        if self._num_characters > _REMEMBERED_CHARACTERS:
            self._forget()
        self._learn(set(words) - self._places.keys())
        return self._look_up(words)

    def _look_up(self, words: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        place = numpy.fromiter(map(self._places.__getitem__, words), numpy.int64, len(words))
        lengths = numpy.frombuffer(self._lengths, numpy.int64)[place]
        ends = numpy.cumsum(lengths)
        first_of_word = numpy.frombuffer(self._starts, numpy.int64)[place] - (ends - lengths)
        from_ids = numpy.repeat(first_of_word, lengths) + numpy.arange(ends[-1])
        ids = numpy.frombuffer(self._ids, numpy.uint32)[from_ids] if len(from_ids) else numpy.empty(0, numpy.uint32)
        return ids, numpy.diff(ends[place == 0], prepend=0)

    def _learn(self, words: set[str]) -> None:
        ascii_words = [word for word in words if not _ODD.search(word)]
        others = list(words.difference(ascii_words))
        self._remember(ascii_words, self._encode_ascii(ascii_words))
        self._remember(others, self._encode(others))

    def _remember(self, words: list[str], encoded: list[list[int]]) -> None:
        for word, ids in zip(words, encoded):
            self._places[word] = len(self._starts)
            self._starts.append(len(self._ids))
            self._lengths.append(len(ids))
            self._ids.extend(ids)
            self._num_characters += len(word)


def _words_of(text: str) -> list[str]:
    """The words of a text without newlines."""
    words: list[str] = []
    done = 0
    for odd in _ODD.finditer(text):
        if odd.start() < done:
            continue  # of a word that is known already
        begin, end = text.rfind(" ", done, odd.start()) + 1, text.find(" ", odd.end())
        end = len(text) if end < 0 else end
        words += _RUN_OR_SIGN.findall(text, done, begin)
        words.append(text[begin:end])
        done = end
    return words + _RUN_OR_SIGN.findall(text, done)
