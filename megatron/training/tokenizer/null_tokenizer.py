"""A tokenizer for text that is token ids already."""

from __future__ import annotations

from collections.abc import Iterable

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


class NullTokenizer(MegatronTokenizer):
    """Text is token ids separated by spaces; one further id, `vocab_size` as given, ends a document."""

    identifier = "_NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None, vocab_size=vocab_size)
        if int(vocab_size) < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self._eod_id = int(vocab_size)

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

    @property
    def cls(self) -> int:
        return -1

    @property
    def sep(self) -> int:
        return -1

    @property
    def mask(self) -> int:
        return -1

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        """Ids of sentinels; there are none."""
        return None
