"""What a dataset may ask of a tokenizer."""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy


class MegatronTokenizer(ABC):
    """Text to token ids and back, with the ids of the special tokens.

    `unique_identifiers` describes the tokenizer in the names of dataset caches: the class, the files it was
    built from, and its options as text. A special token that a tokenizer lacks raises NotImplementedError.
    """

    identifier: str | None = None
    """Class name written to `unique_identifiers`; None: the name of the Python class."""

    def __init__(self, *tokenizer_paths: str | None, **tokenizer_options: Any) -> None:
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = self.identifier or type(self).__name__
        self.unique_identifiers["tokenizer_path"] = list(tokenizer_paths)
        for option, value in tokenizer_options.items():
            self.unique_identifiers[option] = str(value)
        self.unique_description = json.dumps(self.unique_identifiers, indent=4)

    @abstractmethod
    def tokenize(self, text: str) -> numpy.ndarray | list[int]:
        """The token ids of `text`."""

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text; tokenizers with a faster way for many texts override this."""
        return [list(self.tokenize(text)) for text in texts]

    def tokenize_flat(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The ids of all texts in a row, and the number of ids of each: what is written to token files."""
        encoded = self.tokenize_batch(texts)
        lengths = numpy.fromiter(map(len, encoded), numpy.int64, len(encoded))
        ids = numpy.fromiter(itertools.chain.from_iterable(encoded), numpy.int64, int(lengths.sum()))
        return ids, lengths

    def tokenize_parts(self, parts: Iterable[str]) -> Iterator[numpy.ndarray]:
        """The ids of one text that comes in parts, cut anywhere.

        A tokenizer that knows where cutting a text does not change its ids overrides this, so that a text of any
        length takes little memory.
        """
        yield self.tokenize_flat(["".join(parts)])[0]

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        """The text of token ids."""
        raise self._lacks("detokenize")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """For each token, the index in `text` of the character it starts in."""
        raise self._lacks("offsets")

    @property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Token text -> id."""

    @property
    @abstractmethod
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, without padding; every id is below it."""

    @property
    def cls(self) -> int:
        raise self._lacks("cls")

    @property
    def sep(self) -> int:
        raise self._lacks("sep")

    @property
    def pad(self) -> int:
        raise self._lacks("pad")

    @property
    def eod(self) -> int:
        raise self._lacks("eod")

    @property
    def bos(self) -> int:
        raise self._lacks("bos")

    @property
    def eos(self) -> int:
        raise self._lacks("eos")

    @property
    def mask(self) -> int:
        raise self._lacks("mask")

    def _lacks(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no '{what}'")
