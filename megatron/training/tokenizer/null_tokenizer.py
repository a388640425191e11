"""A tokenizer for text that is token ids already."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer


class NullTokenizer(VocabularyTokenizer):
    """Text is token ids separated by spaces; one further id, `vocab_size` as given, ends a document."""

    identifier = "_NullTokenizer"
    _cuts = " \n"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None, vocab_size=vocab_size)
        if int(vocab_size) < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self._eod_id = int(vocab_size)
        self._special_ids = {"eod": self._eod_id, "cls": -1, "sep": -1, "mask": -1}

    def tokenize(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if not word.isdecimal() or int(word) > self._eod_id:
                raise ValueError(f"{word!r} is not a token id between 0 and {self._eod_id}")
            ids.append(int(word))
        return ids

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return " ".join(str(int(token)) for token in ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        starts, position = [], 0
        for token in ids:
            starts.append(position)
            position += len(str(int(token))) + 1
        return starts

    @property
    def vocab_size(self) -> int:
        return self._eod_id + 1

    @property
    def vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocab_size)}

    @property
    def inv_vocab(self) -> dict[int, str]:
        return {token: str(token) for token in range(self.vocab_size)}


IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
"""Stands for a picture in the ids given to a vision-language model; no row of the embedding."""


class NullMultimodalTokenizer(NullTokenizer):
    """As `NullTokenizer`; the word <image> between the ids stands for a picture.

    Args:
        image_token_id: what <image> becomes.
    """

    identifier = "_NullMultimodalTokenizer"

    def __init__(self, vocab_size: int, image_token: str = IMAGE_TOKEN, image_token_id: int = IMAGE_TOKEN_ID) -> None:
        super().__init__(vocab_size)
        self.image_token, self.image_token_id = image_token, image_token_id

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(self.image_token)):
            ids += [self.image_token_id] * (i > 0) + super().tokenize(part)
        return ids

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return " ".join(self.image_token if token == self.image_token_id else str(int(token)) for token in ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        words = [match.start() for match in re.finditer(rf"{re.escape(self.image_token)}|\d+", text)]
        return words + [len(text)] * (len(ids) - len(words))

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of a token, or of each of several."""
        if isinstance(tokens, str):
            return self.image_token_id if tokens == self.image_token else self._vocab_id(tokens)
        return [self.image_token_id if token == self.image_token else self._vocab_id(token) for token in tokens]

    def _vocab_id(self, token: str) -> int:
        return super().tokenize(token)[0]
