"""The byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2) from its two vocabulary files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer
from megatron.training.tokenizer.bpe_engines import (
    Engine,
    EngineName,
    byte_alphabet,
    gigatoken_engine,
    gpt2_tiktoken_engine,
    has_tiktoken,
    tiktoken_agrees,
    tokenizers_engine,
)

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(VocabularyTokenizer):
    """Ids as GPT-2's: every byte has a token, so that any text can be written and read back unchanged.

    The text "<|endoftext|>" inside a document is encoded like any other; only `eod` has its id.

    Args:
        vocab_file: JSON object, token -> id.
        merge_file: one merge a line, the first learned first.
        engine: what encodes many texts. "auto": tiktoken's where it is installed and proven to give the ids of
            this vocabulary, else the library `tokenizers`.
    """

    identifier = "_GPT2BPETokenizer"
    _cuts = " \n"

    def __init__(self, vocab_file: str, merge_file: str, engine: EngineName = "auto") -> None:
        super().__init__(vocab_file, merge_file)
        self._files = (vocab_file, merge_file)
        self._tokenizer = _load(vocab_file, merge_file)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        if END_OF_TEXT not in vocab:
            raise ValueError(f"{vocab_file} lacks the token {END_OF_TEXT}, which ends documents")
        self._set_vocabulary(vocab, eod=vocab[END_OF_TEXT], eos=vocab[END_OF_TEXT])
        self._engine_name = engine

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def tokenize_flat(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return self._engine(texts)

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        # one character of a token stands for one byte; the end of a document stands for no text
        num_bytes = [0 if token == self.eod else len(self._inv_vocab[token]) for token in ids]
        return byte_offsets(num_bytes, text)

    @property
    def vocab_size(self) -> int:
        return max(self._inv_vocab) + 1

    @cached_property
    def _engine(self) -> Engine:
        """Made when the first batch comes: training reads ids and never needs it."""
        ranks = self._tiktoken_ranks() if self._engine_name in ("auto", "tiktoken") else None
        if ranks is not None and (self._engine_name == "tiktoken" or has_tiktoken()):
            return gpt2_tiktoken_engine(ranks)
        match self._engine_name:
            case "gigatoken":
                return gigatoken_engine(self._tokenizer)
            case "tiktoken":
                raise ValueError(f"{' and '.join(self._files)}: tiktoken's engine would not follow these merges")
            case _:
                return tokenizers_engine(self._tokenizer)

    def _tiktoken_ranks(self) -> dict[bytes, int] | None:
        """Bytes of each token -> id; None: tiktoken would not give the ids of this vocabulary."""
        from tokenizers import Tokenizer

        merges = read_merges(self._files[1])
        alphabet = byte_alphabet()
        if not alphabet.keys() <= self._vocab.keys():
            return None
        if not tiktoken_agrees(Tokenizer(self._tokenizer.model), self._vocab, merges):
            return None
        tokens = [*alphabet, *(first + second for first, second in merges)]
        return {bytes(alphabet[letter] for letter in token): self._vocab[token] for token in tokens}


def byte_offsets(num_bytes: list[int], text: str) -> list[int]:
    """For tokens of these lengths, the character of `text` in which each starts."""
    ends = list(itertools.accumulate(num_bytes))
    encoded = numpy.frombuffer(text.encode("utf-8"), numpy.uint8)
    if ends and ends[-1] > len(encoded):
        raise ValueError(f"the tokens have {ends[-1]} bytes, the text has {len(encoded)}")
    starts_character = (encoded & 0xC0) != 0x80
    character = [*(numpy.cumsum(starts_character) - 1).tolist(), len(text)]
    return [character[end - length] for end, length in zip(ends, num_bytes)]


def read_merges(merge_file: str) -> list[tuple[str, str]]:
    """The pairs of a merge file, in order."""
    lines = Path(merge_file).read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _load(vocab_file: str, merge_file: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    for path in (vocab_file, merge_file):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no vocabulary file {path}")
    try:
        model = models.BPE.from_file(vocab_file, merge_file)
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ValueError(f"{vocab_file} and {merge_file} are not a BPE vocabulary: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
