"""The byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2) from its two vocabulary files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(MegatronTokenizer):
    """Ids as GPT-2's: every byte has a token, so that any text can be written and read back unchanged.

    The text "<|endoftext|>" inside a document is encoded like any other; only `eod` has its id.

    Args:
        vocab_file: JSON object, token -> id.
        merge_file: one merge a line, the first learned first.
    """

    identifier = "_GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        super().__init__(vocab_file, merge_file)
        self._tokenizer = _load(vocab_file, merge_file)
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        self._inv_vocab = {token_id: token for token, token_id in self._vocab.items()}
        if END_OF_TEXT not in self._vocab:
            raise ValueError(f"{vocab_file} lacks the token {END_OF_TEXT}, which ends documents")
        self._eod_id = self._vocab[END_OF_TEXT]
        self._vocab_size = max(self._inv_vocab) + 1

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        # one character of a token stands for one byte; the end of a document stands for no text
        num_bytes = [0 if token == self._eod_id else len(self._inv_vocab[token]) for token in ids]
        ends = list(itertools.accumulate(num_bytes))
        encoded = numpy.frombuffer(text.encode("utf-8"), numpy.uint8)
        if ends and ends[-1] > len(encoded):
            raise ValueError(f"the tokens have {ends[-1]} bytes, the text has {len(encoded)}")
        starts_character = (encoded & 0xC0) != 0x80
        character = [*(numpy.cumsum(starts_character) - 1).tolist(), len(text)]
        return [character[end - length] for end, length in zip(ends, num_bytes)]

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def eos(self) -> int:
        return self._eod_id


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
