"""Building sample and blending indices with numpy: no compiler, no loops over documents or samples."""

from __future__ import annotations

import numpy

_DOCUMENTS = 1 << 16  # documents added up at a time: their lengths stay in the cache, temporary memory small
_ROWS = 1 << 16  # samples located at a time
_SEGMENT = 512  # steps of the blending rule that one row of a vectorised run takes
_WARMUP = 128  # steps after which a row has usually met the true course


def build_sample_index(
    sequence_lengths: numpy.ndarray,
    document_index: numpy.ndarray,
    sequence_length: int,
    num_samples: int,
    add_extra_token: bool = True,
) -> numpy.ndarray:
    """Where each sample starts, as (position in `document_index`, token offset): [num_samples + 1, 2].

    Sample i takes the tokens from i * sequence_length on, plus one extra token if `add_extra_token`, out of
    the sequences in the order of `document_index`. A boundary lies in the sequence that holds the last token
    of the sample before it, so without the extra token its offset may equal that sequence's length. Where the
    tokens run out, the boundary lies at the end of the last sequence.

    Returns int32 if positions and lengths fit, otherwise int64.
    """
    extra = 1 if add_extra_token else 0
    fits = max(len(document_index), int(sequence_lengths.max(initial=0))) <= numpy.iinfo(numpy.int32).max
    index = numpy.empty((num_samples + 1, 2), dtype=numpy.int32 if fits else numpy.int64)
    row, read = 0, 0  # rows done, tokens of the documents before
    for first in range(0, len(document_index), _DOCUMENTS):
        lengths = sequence_lengths[document_index[first : first + _DOCUMENTS]]
        ends = numpy.cumsum(lengths, dtype=numpy.int64)
        ends += read
        read = int(ends[-1])
        stop = min(num_samples, max(read - extra, -1) // sequence_length) + 1  # rows that lie in these documents
        while row < stop:
            rows = index[row : min(row + _ROWS, stop)]
            starts = numpy.arange(row, row + len(rows), dtype=numpy.int64) * sequence_length
            places = numpy.searchsorted(ends, starts + (extra - 1), side="right")
            rows[:, 0] = places
            rows[:, 0] += first
            starts -= ends[places]
            starts += lengths[places]
            rows[:, 1] = starts
            row += len(rows)
    if row <= num_samples and len(document_index):
        last = len(document_index) - 1
        index[row:] = last, int(sequence_lengths[document_index[last]]) - extra
    index[0] = 0
    return index


def build_blending_indices(
    weights: numpy.ndarray, size: int, limits: numpy.ndarray | None = None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Which dataset each of `size` samples comes from, and which sample of it: ([size] int16, [size] int64).

    Step k gives the sample to the dataset that lags most behind its share, the first d with the largest
    weights[d] * max(k, 1) - count[d] in float64; with `limits`, only among datasets with count[d] <
    limits[d].
    """
    rule = _GreedyRule(weights, limits)
    if size <= 8 * _SEGMENT:
        dataset_index, _ = rule.run(numpy.zeros(len(weights)), 0, size)
    else:
        dataset_index = _run_in_segments(rule, size)
    return dataset_index, _count_earlier(dataset_index, len(weights))


class _GreedyRule:
    """The blending rule, for one start at a time or for many at once."""

    def __init__(self, weights: numpy.ndarray, limits: numpy.ndarray | None) -> None:
        self.weights = numpy.asarray(weights, dtype=numpy.float64)
        self.limits = None if limits is None else numpy.asarray(limits, dtype=numpy.float64)

    def run(self, counts: numpy.ndarray, step: int, num_steps: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Choices of `num_steps` steps from `step` on, and the counts after them; about 1 us a step."""
        count, weights = counts.tolist(), self.weights.tolist()
        limits = [float("inf")] * len(count) if self.limits is None else self.limits.tolist()
        for d, limit in enumerate(limits):
            if count[d] >= limit:
                weights[d] = float("-inf")
        choices = numpy.empty(num_steps, dtype=numpy.int16)
        for i in range(num_steps):
            x = float(max(step + i, 1))
            lags = [weight * x - taken for weight, taken in zip(weights, count)]
            chosen = lags.index(max(lags))
            choices[i] = chosen
            count[chosen] += 1.0
            if count[chosen] >= limits[chosen]:
                weights[chosen] = float("-inf")
        return choices, numpy.array(count)

    def run_many(self, counts: numpy.ndarray, steps: numpy.ndarray, num_steps: int) -> numpy.ndarray:
        """Choices [num_steps, rows] of rows starting at `steps` with `counts` [rows, d], changed in place."""
        choices = numpy.empty((num_steps, len(steps)), dtype=numpy.int16)
        flat, row_start = counts.reshape(-1), numpy.arange(len(steps)) * counts.shape[1]
        lags, x = numpy.empty_like(counts), numpy.empty(len(steps))
        for i in range(num_steps):
            numpy.maximum(steps + i, 1, out=x)
            numpy.multiply(x[:, None], self.weights, out=lags)
            lags -= counts
            if self.limits is not None:
                lags[counts >= self.limits] = -numpy.inf
            chosen = lags.argmax(axis=1)
            choices[i] = chosen
            flat[row_start + chosen] += 1.0
        return choices

    def guess_counts(self, steps: numpy.ndarray) -> numpy.ndarray:
        """Likely counts before each of `steps`, [rows, datasets]: shares rounded by largest remainder."""
        shares = self.weights * numpy.maximum(steps - 1, 0)[:, None]
        counts = numpy.floor(shares)
        missing = steps - counts.sum(axis=1)
        order = numpy.argsort(counts - shares, axis=1, kind="stable")  # largest remainder first
        rank = numpy.argsort(order, axis=1)
        return counts + (rank < missing[:, None])


def _run_in_segments(rule: _GreedyRule, size: int) -> numpy.ndarray:
    """The choices of the rule, with all segments of the course run at once from guessed counts.

    The rule forgets: from slightly wrong counts it soon makes the same choices again. Each segment therefore
    starts a little early, and what it had reached at its first own step is compared with what the segment
    before it ends with. Segments that were wrong are run again from the right counts, so the result is exact
    in every case.
    """
    num_segments = size // _SEGMENT
    steps = numpy.arange(num_segments, dtype=numpy.int64) * _SEGMENT
    starts = rule.guess_counts(numpy.maximum(steps - _WARMUP, 0))
    rule.run_many(starts, steps - _WARMUP, _WARMUP)
    starts[0] = 0
    ends = starts.copy()
    choices = numpy.ascontiguousarray(rule.run_many(ends, steps, _SEGMENT).T)  # [segments, steps]

    _repair_together(rule, choices, starts, ends, steps)
    for i in range(1, num_segments):
        if not numpy.array_equal(starts[i], ends[i - 1]):
            starts[i] = ends[i - 1]
            choices[i], ends[i] = rule.run(starts[i], int(steps[i]), _SEGMENT)
    tail, _ = rule.run(ends[-1], num_segments * _SEGMENT, size - num_segments * _SEGMENT)
    return numpy.concatenate([choices.reshape(-1), tail])


def _repair_together(
    rule: _GreedyRule,
    choices: numpy.ndarray,
    starts: numpy.ndarray,
    ends: numpy.ndarray,
    steps: numpy.ndarray,
) -> None:
    """Run wrong segments again, many at once, as long as that leaves much fewer of them."""
    num_wrong = len(steps)
    while True:
        wrong = 1 + numpy.flatnonzero((starts[1:] != ends[:-1]).any(axis=1))
        if not 32 <= len(wrong) < num_wrong // 2:
            return
        num_wrong = len(wrong)
        counts = ends[wrong - 1]
        starts[wrong] = counts
        choices[wrong] = rule.run_many(counts, steps[wrong], _SEGMENT).T
        ends[wrong] = counts


def _count_earlier(values: numpy.ndarray, num_values: int) -> numpy.ndarray:
    """For each entry, how many equal ones stand before it."""
    counts = numpy.empty(len(values), dtype=numpy.int64)
    order = numpy.argsort(values, kind="stable")
    totals = numpy.bincount(values, minlength=num_values)
    firsts = numpy.cumsum(totals) - totals
    counts[order] = numpy.arange(len(values)) - numpy.repeat(firsts, totals)
    return counts
