"""Small datasets for tests."""

from __future__ import annotations

from pathlib import Path

import numpy

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


class LetterTokenizer(MegatronTokenizer):
    """Ids 0 to 99, the last one ends documents."""

    def __init__(self, pad: int | None = None) -> None:
        super().__init__("letters", pad=pad)
        self._pad = pad

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) - 32 for character in text]

    @property
    def vocab(self) -> dict[str, int]:
        return {chr(token + 32): token for token in range(100)}

    @property
    def inv_vocab(self) -> dict[int, str]:
        return {token: chr(token + 32) for token in range(100)}

    @property
    def vocab_size(self) -> int:
        return 100

    @property
    def eod(self) -> int:
        return 99

    @property
    def pad(self) -> int:
        if self._pad is None:
            raise self._lacks("pad")
        return self._pad


def write_dataset(prefix: Path, documents: list[list[int]], dtype: type[numpy.number] = numpy.uint16) -> str:
    """A dataset with one sequence a document; returns its prefix."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype)
    for document in documents:
        builder.add_document(numpy.array(document, dtype=numpy.int64), [len(document)])
    builder.finalize(get_idx_path(str(prefix)))
    return str(prefix)


def random_documents(num_documents: int, seed: int = 0, max_length: int = 40) -> list[list[int]]:
    """Documents of ids below 99 that end with 99."""
    rng = numpy.random.default_rng(seed)
    lengths = rng.integers(0, max_length, num_documents)
    return [[*rng.integers(0, 99, length).tolist(), 99] for length in lengths]


def gpt_config(**settings: object) -> GPTDatasetConfig:
    """A configuration with the settings that must be given."""
    given: dict[str, object] = {
        "random_seed": 1234,
        "sequence_length": 16,
        "tokenizer": LetterTokenizer(),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
    }
    return GPTDatasetConfig(**(given | settings))  # type: ignore[arg-type]
