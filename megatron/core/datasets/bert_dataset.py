"""Samples for pretraining BERT: hidden tokens to be found, and whether two parts stand in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset, MaskedWordPieceDatasetConfig, padded
from megatron.core.datasets.masked_sample_index import SentenceGrouping

_NO_LABEL = -1


@dataclass
class BERTMaskedWordPieceDatasetConfig(MaskedWordPieceDatasetConfig):
    """Settings of `BERTMaskedWordPieceDataset`."""

    classification_head: bool | None = None
    """Make samples of two parts, whose order is to be told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classification_head is None:
            raise ValueError("BERTMaskedWordPieceDatasetConfig needs classification_head")


class BERTMaskedWordPieceDataset(MaskedWordPieceDataset):
    """Samples `[CLS] A [SEP]` or, with a classification head, `[CLS] A [SEP] B [SEP]`.

    An item is a dictionary of numpy arrays, int64, [s] unless said otherwise:

    - text: token ids, some of them hidden. types: 1 for B and its [SEP], else 0. padding_mask: 1 on real tokens.
    - labels: the original id of each hidden token, -1 elsewhere. loss_mask: 1 on hidden tokens.
    - is_random: scalar, 1 where B came before A in the text. truncated: scalar, 1 where tokens were left out.

    Of the hidden tokens 80 % are replaced by [MASK], 10 % by a random token, 10 % stay (Devlin et al.,
    arXiv:1810.04805, A.1); the order of parts is that of Lan et al., arXiv:1909.11942, 3.1.
    """

    config: BERTMaskedWordPieceDatasetConfig

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MaskedWordPieceDataset._key_config_attributes(), "classification_head"]

    def _grouping(self) -> SentenceGrouping:
        assert self.config.short_sequence_probability is not None
        return SentenceGrouping(
            target_length=self.config.sequence_length - 3,
            short_sequence_probability=self.config.short_sequence_probability,
            min_num_sentences=2 if self.config.classification_head else 1,
            seed=self.config.random_seed,
        )

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sentences, target_length, rng = self._sentences(idx)
        first, second, is_random = self._parts(sentences, rng)
        truncated = _truncate(first, second, target_length, rng)
        tokens, types = self._joined(first, second)
        masked = self._mask(tokens, target_length, rng)
        s = self.config.sequence_length
        assert self.config.tokenizer is not None
        pad = self.config.tokenizer.pad
        labels = numpy.full(s, _NO_LABEL, dtype=numpy.int64)
        labels[masked.positions] = masked.labels
        loss_mask = numpy.zeros(s, dtype=numpy.int64)
        loss_mask[masked.positions] = 1
        return {
            "text": padded(masked.tokens, s, pad),
            "types": padded(types, s, pad),
            "labels": labels,
            "is_random": int(is_random),
            "padding_mask": padded([1] * len(tokens), s, pad),
            "loss_mask": loss_mask,
            "truncated": int(truncated),
        }

    def _parts(
        self, sentences: list[numpy.ndarray], rng: numpy.random.RandomState
    ) -> tuple[list[int], list[int], bool]:
        """A, B and whether they were swapped; B is empty without a classification head."""
        if not self.config.classification_head:
            return _flat(sentences), [], False
        if len(sentences) < 2:
            raise ValueError("a sample with a classification head needs at least two sentences")
        pivot = rng.randint(low=1, high=len(sentences)) if len(sentences) >= 3 else 1
        first, second = _flat(sentences[:pivot]), _flat(sentences[pivot:])
        is_random = rng.random_sample() < 0.5
        return (second, first, True) if is_random else (first, second, False)

    def _joined(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """Tokens and types of both parts, with the special tokens."""
        tokenizer = self.config.tokenizer
        assert tokenizer is not None
        tokens = [tokenizer.cls, *first, tokenizer.sep]
        types = [0] * len(tokens)
        if second:
            tokens += [*second, tokenizer.sep]
            types += [1] * (len(second) + 1)
        return tokens, types

    def _replacement(self, token: int, rng: numpy.random.RandomState) -> int:
        assert self.config.tokenizer is not None
        if rng.random_sample() < 0.8:
            return self.config.tokenizer.mask
        if rng.random_sample() >= 0.5:
            return int(self._vocab_ids[rng.randint(0, len(self._vocab_ids))])
        return token


def _flat(sentences: list[numpy.ndarray]) -> list[int]:
    return numpy.concatenate(sentences).tolist()


def _truncate(first: list[int], second: list[int], length: int, rng: numpy.random.RandomState) -> bool:
    """Drop tokens at a random end of the longer part, in place, until both fit; whether that was needed."""
    truncated = len(first) + len(second) > length
    while len(first) + len(second) > length:
        longer = first if len(first) > len(second) else second
        if rng.random_sample() < 0.5:
            del longer[0]
        else:
            longer.pop()
    return truncated
