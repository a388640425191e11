"""What tokenizers over a fixed vocabulary share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


def _special(name: str) -> property:
    def read(self: VocabularyTokenizer) -> int:
        if name not in self._special_ids:
            raise self._lacks(name)
        return self._special_ids[name]

    return property(read, doc=f"Id of the token '{name}'.")


class VocabularyTokenizer(MegatronTokenizer):
    """A tokenizer whose vocabulary and special tokens are tables; a subclass fills them in its constructor."""

    def __init__(self, *tokenizer_paths: str | None, **tokenizer_options: Any) -> None:
        super().__init__(*tokenizer_paths, **tokenizer_options)
        self._vocab: dict[str, int] = {}
        self._inv_vocab: dict[int, str] = {}
        self._special_ids: dict[str, int] = {}
        self._sentinel_ids: list[int] | None = None

    def _set_vocabulary(self, vocab: dict[str, int], **special_ids: int) -> None:
        self._vocab = vocab
        self._inv_vocab = {token_id: token for token, token_id in vocab.items()}
        self._special_ids = special_ids

    def _add_token(self, token: str) -> int:
        """The id of a token, which is put at the end of the vocabulary if it is new."""
        if token not in self._vocab:
            token_id = self._vocab[token] = self.vocab_size
            self._inv_vocab[token_id] = token
        return self._vocab[token]

    def _add_sentinels(self, count: int) -> None:
        self._sentinel_ids = [self._add_token(f"<extra_id_{i}>") for i in range(count)]

    _cuts = ""
    """White space at which a text may be cut without changing its ids: none, " " or " \\n"."""

    def tokenize_parts(self, parts: Iterable[str]) -> Iterator[numpy.ndarray]:
        if not self._cuts:
            yield from super().tokenize_parts(parts)
            return
        rest, is_first = "", True
        for part in parts:
            text = rest + part
            if cut := _last_cut(text, self._cuts):
                yield self._tokenize_part(text[:cut], is_first)
                is_first = False
            rest = text[cut:]
        yield self._tokenize_part(rest, is_first)

    def _tokenize_part(self, text: str, is_first: bool) -> numpy.ndarray:
        """Ids of what stands between two cuts; all parts but the first begin with the white space of the cut."""
        return self.tokenize_flat([text])[0]

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def vocab_size(self) -> int:
        return len(self._inv_vocab)

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        """Ids of the sentinels <extra_id_i>; None: this kind of tokenizer has none."""
        return self._sentinel_ids

    cls, sep, mask = _special("cls"), _special("sep"), _special("mask")
    pad, bos, eos, eod = _special("pad"), _special("bos"), _special("eos"), _special("eod")


_SEARCHED_CHARACTERS = 1 << 12


def _last_cut(text: str, cuts: str) -> int:
    """The last single character of `cuts` in `text` with a letter or digit on either side; 0 if there is none.

    Splitting rules that look at letters, digits and white space begin a new piece there.
    """
    for end in range(len(text), 0, -_SEARCHED_CHARACTERS):
        start = max(0, end - _SEARCHED_CHARACTERS - 2)  # two more: a cut has a neighbour on either side
        for match in reversed(list(re.finditer(rf"[^\W_](?=[{cuts}][^\W_])", text[start:end]))):
            return start + match.end()
    return 0
