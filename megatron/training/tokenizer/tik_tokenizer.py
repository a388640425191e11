"""Byte-pair vocabularies in the JSON layout of tekken, encoded by tiktoken."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer
from megatron.training.tokenizer.bpe_engines import Engine, tiktoken_engine
from megatron.training.tokenizer.gpt2_bpe_tokenizer import byte_offsets

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_NUMBERS_AND_SPACE = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?\p{L}+" + _NUMBERS_AND_SPACE % "",
    "v2": rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    + _NUMBERS_AND_SPACE % "/",
}
"""How text is split into words before bytes are merged; a digit is a word of its own."""

DEFAULT_VOCAB_SIZE = 1 << 17
DEFAULT_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


class TikTokenizer(VocabularyTokenizer):
    """The first ids are special tokens, which are never found in a text; the ranks of the vocabulary follow.

    Args:
        path: JSON list of objects with `rank` (the position in the list), `token_bytes` (base64) and `token_str`;
            the first 256 are the single bytes.
        pattern: name in `PATTERNS`, or a pattern.
        vocab_size: all ids together; the last ranks that do not fit are left out. None: 131072.
        num_special_tokens: ids kept for special tokens; those without a name are called <SPECIAL_i>.
        special_tokens: their names, among them <unk>, <s> and </s>, which ends documents.
    """

    identifier = "CustomTikTokenizer"
    _cuts = " \n"

    def __init__(
        self,
        path: str,
        pattern: str = "v2",
        vocab_size: int | None = None,
        num_special_tokens: int = 1000,
        special_tokens: list[str] | None = None,
    ) -> None:
        pattern = PATTERNS.get(pattern, pattern)
        super().__init__(
            path,
            pattern=pattern,
            vocab_size=vocab_size,
            num_special_tokens=num_special_tokens,
            special_tokens=special_tokens,
        )
        vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
        names = DEFAULT_SPECIAL_TOKENS.copy() if special_tokens is None else list(special_tokens)
        _check_special_tokens(names, num_special_tokens, vocab_size)
        self._pattern = pattern
        self._num_special = num_special_tokens
        self._bytes = _read_tokens(path, vocab_size - num_special_tokens)
        names += [f"<SPECIAL_{i}>" for i in range(len(names), num_special_tokens)]
        texts = [*names, *(token.decode("utf-8", errors="replace") for token in self._bytes)]
        vocab: dict[str, int] = {}
        for token_id, text in enumerate(texts):
            vocab.setdefault(text, token_id)  # tokens that are parts of characters look alike as text
        special = {kind: vocab[name] for kind, name in _KINDS.items()}
        self._set_vocabulary(vocab, **special)
        self._inv_vocab = dict(enumerate(texts))

    def tokenize(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self.tokenize_flat([text])[0].tolist()
        return [self.bos] * bos + ids + [self.eos] * eos

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.tokenize_flat(texts)
        return [part.tolist() for part in numpy.split(ids, numpy.cumsum(lengths)[:-1])] if texts else []

    def tokenize_flat(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        ids, lengths = self._engine(texts)
        return ids + numpy.uint32(self._num_special), lengths

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return b"".join(self._token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        # special tokens stand for no text: they are not found in one, only put around it
        lengths = [0 if token < self._num_special else len(self._token_bytes(token)) for token in map(int, ids)]
        return byte_offsets(lengths, text)

    @property
    def unk(self) -> int:
        """Id of <unk>, which no text has: every byte is a token."""
        return self._special_ids["unk"]

    @cached_property
    def _engine(self) -> Engine:
        return tiktoken_engine({token: rank for rank, token in enumerate(self._bytes)}, self._pattern)

    def _token_bytes(self, token: int) -> bytes:
        if token < self._num_special:
            return self._inv_vocab[token].encode("utf-8")
        return self._bytes[token - self._num_special]


_KINDS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "eod": "</s>"}


def _check_special_tokens(names: list[str], num_special: int, vocab_size: int) -> None:
    missing = [name for name in DEFAULT_SPECIAL_TOKENS if name not in names]
    if missing:
        raise ValueError(f"tiktoken_special_tokens must have {', '.join(missing)}, got {' '.join(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"tiktoken_special_tokens has a name twice: {' '.join(names)}")
    if len(names) > num_special:
        raise ValueError(f"{len(names)} special tokens do not fit into tiktoken_num_special_tokens ({num_special})")
    if vocab_size < num_special + 256:
        raise ValueError(f"vocab_size ({vocab_size}) must have room for {num_special} special tokens and 256 bytes")


def _read_tokens(path: str, count: int) -> list[bytes]:
    """The bytes of the first `count` tokens, by rank."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no vocabulary file {path}")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        tokens = [_token_of(entry, rank) for rank, entry in enumerate(entries[:count])]
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise ValueError(f"{path} is not a vocabulary of TikTokenizer: {error!r}") from None
    if tokens[:256] != [bytes([byte]) for byte in range(256)]:
        raise ValueError(f"{path} is not a vocabulary of TikTokenizer: the first 256 tokens are not the single bytes")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{path} has a token twice")
    return tokens


def _token_of(entry: dict[str, Any], rank: int) -> bytes:
    if entry["rank"] != rank:
        raise ValueError(f"entry {rank} has the rank {entry['rank']}")
    return base64.b64decode(entry["token_bytes"], validate=True)
