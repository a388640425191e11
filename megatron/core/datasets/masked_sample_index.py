"""Which sentences make up each sample of a masked dataset: pure functions of sentence lengths, sizes and seed.

Sentences of one document are put together until a target length is reached; a share of the targets is short, so that
the model also sees short inputs (Devlin et al., arXiv:1810.04805, A.2). All epochs are then shuffled as one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
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
            x = self._generator.randint(0, 1 << 32, size=_DRAWS, dtype=numpy.uint32)[::-1]
            self._drawn = numpy.where(x % self._ratio, self._length, 2 + x % (self._length - 1)).tolist()
        return self._drawn.pop()


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
    tokens_before = array("q", numpy.cumsum(sentence_lengths, dtype=numpy.int64).tobytes())
    tokens_before.insert(0, 0)
    targets, rows = _Targets(grouping), array("Q")
    while len(rows) < 3 * num_samples:
        before = len(rows)
        for start, end in documents:
            _cut_document(start, end, tokens_before, targets, grouping.min_num_sentences, rows)
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
) -> list[tuple[int, int]]:
    """First sentence, and the one after the last, of the documents that give samples."""
    begins, ends = starts[:-1].astype(numpy.int64), starts[1:].astype(numpy.int64)
    num_long = numpy.concatenate([[0], numpy.cumsum(lengths > LONG_SENTENCE)])
    has_no_long = num_long[begins] == num_long[ends]
    count = ends - begins
    usable = (count >= max(grouping.min_num_sentences, 1)) & ((count == 1) | has_no_long)
    return list(zip(begins[usable].tolist(), ends[usable].tolist()))


def _cut_document(
    first: int, end: int, tokens_before: array[int], targets: _Targets, min_num_sentences: int, rows: array[int]
) -> None:
    """Append the samples of one document. The last one takes what is left, never a single sentence on its own."""
    target = targets.next()
    while True:
        # the sentence after the first one that reaches the target: looked up, since most sentences do not
        stop = bisect_left(tokens_before, tokens_before[first] + target, first + 1, end)
        stop = max(stop, first + min_num_sentences)
        if stop >= end - 1:
            break
        rows.extend((first, stop, target))
        first, target = stop, targets.next()
    rows.extend((first, end, target))
    targets.next()  # that of a sample after the last one, which the rule draws too


def shuffled_order(count: int, seed: int) -> list[int]:
    """A permutation by Fisher and Yates, from the end."""
    order = list(range(count))
    if count > 1:
        sizes = numpy.arange(count, 1, -1, dtype=numpy.uint64)
        chosen = (mt19937_64(seed, count - 1) % sizes).tolist()
        for i, j in zip(range(count - 1, 0, -1), chosen):
            order[i], order[j] = order[j], order[i]
    return order
