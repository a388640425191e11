"""Which sentences make up each sample of a masked dataset: pure functions of sentence lengths, sizes and seed.

Sentences of one document are put together until a target length is reached; a share of the targets is short, so that
the model also sees short inputs (Devlin et al., arXiv:1810.04805, A.2). All epochs are then shuffled as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from megatron.core.datasets.mersenne_twister import mt19937_64

LONG_SENTENCE = 512  # tokens; a document with a longer sentence among several is left out
_DRAWS = 1 << 12  # random numbers drawn at a time


@dataclass(frozen=True)
class SentenceGrouping:
    """How sentences are grouped into samples."""

    target_length: int
    """Tokens that a sample should reach."""

    short_sequence_probability: float
    """Share of samples with a shorter target."""

    min_num_sentences: int
    """Sentences that a sample must have; documents with fewer are left out."""

    seed: int
    """Of the targets; `seed` + 1 is that of the shuffle."""


class _Targets:
    """Target lengths, one after the other, drawn by a 32-bit Mersenne Twister."""

    def __init__(self, grouping: SentenceGrouping) -> None:
        probability = grouping.short_sequence_probability
        self._length = grouping.target_length
        self._ratio = round(1 / probability) if probability else 0
        self._generator = numpy.random.RandomState(grouping.seed)
        self._drawn: list[int] = []

    def next(self) -> int:
        """2 to the full length for one draw in `ratio`, else the full length."""
        if not self._ratio:
            return self._length
        if not self._drawn:
            self._drawn = self._generator.randint(0, 1 << 32, size=_DRAWS, dtype=numpy.uint32)[::-1].tolist()
        x = self._drawn.pop()
        return 2 + x % (self._length - 1) if x % self._ratio == 0 else self._length


def build_masked_sample_index(
    document_starts: numpy.ndarray,
    sentence_lengths: numpy.ndarray,
    num_samples: int,
    grouping: SentenceGrouping,
) -> numpy.ndarray:
    """Samples as rows (first sentence, sentence after the last, target length), shuffled: [at least num_samples, 3].

    Epochs are added until there are `num_samples` samples; the last one stays whole.

    Args:
        document_starts: [documents + 1], the sentence each document starts with, then the one after all.
        sentence_lengths: [sentences], tokens of each.

    Returns uint32, or uint64 where sentences are too many for it.

    Raises:
        ValueError: no document gives a sample.
    """
    documents = _usable_documents(document_starts, sentence_lengths, grouping)
    targets = _Targets(grouping)
    rows: list[tuple[int, int, int]] = []
    while len(rows) < num_samples:
        before = len(rows)
        for start, lengths in documents:
            _cut_document(start, lengths, targets, grouping.min_num_sentences, rows)
        if len(rows) == before:
            raise ValueError(
                f"no document has at least {grouping.min_num_sentences} sentence(s), none longer than {LONG_SENTENCE} "
                "tokens: was the text split into sentences (--split-sentences)?"
            )
    dtype = numpy.uint32 if len(sentence_lengths) <= numpy.iinfo(numpy.uint32).max else numpy.uint64
    index = numpy.array(rows, dtype=dtype).reshape(-1, 3)
    return index[shuffled_order(len(index), grouping.seed + 1)]


def _usable_documents(
    starts: numpy.ndarray, lengths: numpy.ndarray, grouping: SentenceGrouping
) -> list[tuple[int, list[int]]]:
    """(first sentence, sentence lengths) of the documents that give samples."""
    documents = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        count = end - start
        if count < max(grouping.min_num_sentences, 1):
            continue
        of_document = lengths[start:end].tolist()
        if count == 1 or max(of_document) <= LONG_SENTENCE:
            documents.append((start, of_document))
    return documents


def _cut_document(
    start: int, lengths: list[int], targets: _Targets, min_num_sentences: int, rows: list[tuple[int, int, int]]
) -> None:
    """Append the samples of one document. The last one takes what is left, never a single sentence on its own."""
    first, length, target = 0, 0, targets.next()
    last = len(lengths) - 1
    for i, tokens in enumerate(lengths):
        length += tokens
        full = length >= target and i < last - 1 and i + 1 - first >= min_num_sentences
        if full or i == last:
            rows.append((start + first, start + i + 1, target))
            first, length, target = i + 1, 0, targets.next()


def shuffled_order(count: int, seed: int) -> list[int]:
    """A permutation by Fisher and Yates, from the end."""
    order = list(range(count))
    if count > 1:
        sizes = numpy.arange(count, 1, -1, dtype=numpy.uint64)
        chosen = (mt19937_64(seed, count - 1) % sizes).tolist()
        for i, j in zip(range(count - 1, 0, -1), chosen):
            order[i], order[j] = order[j], order[i]
    return order
