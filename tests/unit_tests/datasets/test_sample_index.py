"""The sampling rules against vectors of the format's specification and a slow reference written here."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets.gpt_sample_index import build_indices, plan_samples, shuffle_dtype
from megatron.core.datasets.helpers import build_blending_indices, build_sample_index

LENGTHS = [5, 3, 9, 4, 7, 2, 6, 8]


def indices(num_samples: int | None, extra: int, drop_last: bool = True) -> tuple[list[int], list[tuple], list[int]]:
    plan = plan_samples(sum(LENGTHS), 8, num_samples, bool(extra), drop_last)
    arrays = build_indices(plan, numpy.array(LENGTHS, numpy.int32), numpy.arange(8), 8, bool(extra), 1234)
    samples = [tuple(row) for row in arrays["sample_index"].tolist()]
    return arrays["document_index"].tolist(), samples, arrays["shuffle_index"].tolist()


ONE_EPOCH = [2, 1, 6, 0, 4, 5, 3, 7]


def test_one_epoch() -> None:
    samples = [(0, 0), (0, 8), (2, 4), (4, 1), (6, 0), (7, 4)]
    assert indices(None, extra=1) == (ONE_EPOCH, samples, [2, 0, 4, 3, 1])


def test_separate_last_epoch() -> None:
    documents, samples, shuffle = indices(7, extra=1)
    assert documents == [*ONE_EPOCH, 5, 0, 3, 4, 2, 6, 1, 7]
    assert samples[5:] == [(7, 4), (9, 2), (11, 1), (12, 2), (13, 1), (15, 0)]
    assert shuffle == [1, 0, 3, 2, 4, 7, 6, 8, 9, 5]


def test_three_epochs() -> None:
    documents, _, shuffle = indices(12, extra=1)
    expected = [5, 3, 0, 4, 6, 2, 2, 7, 1, 1, 0, 4, 5, 6, 3, 7, 5, 1, 3, 4, 0, 7, 6, 2]
    assert documents == expected
    assert shuffle == [7, 4, 1, 5, 3, 9, 2, 8, 6, 0, 15, 11, 10, 14, 13, 12]


def test_without_extra_token() -> None:
    _, samples, shuffle = indices(None, extra=0)
    assert samples == [(0, 0), (0, 8), (2, 4), (4, 1), (5, 2), (7, 4)]
    assert shuffle == [2, 0, 4, 3, 1]


def test_partial_last_sample() -> None:
    _, samples, shuffle = indices(None, extra=1, drop_last=False)
    assert len(samples) == 7 and samples[-1] == (7, 7)
    assert shuffle == [0, 4, 3, 2, 5, 1]


def slow_indices(
    lengths: list[int],
    documents: list[int],
    q: int,
    seed: int,
    wanted: int | None,
    extra: int,
    drop_last: bool,
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """The rules, token by token."""
    per_epoch = sum(lengths[d] for d in documents)
    epochs = 1
    while wanted is not None and epochs * per_epoch < wanted * q + extra:
        epochs += 1
    separate = False
    if epochs > 1:
        before = ((epochs - 1) * per_epoch - extra) // q
        separate = wanted - before < int(0.80 * ((per_epoch - extra) // q))
    rng = numpy.random.RandomState(seed)
    document_index: list[int] = []
    for count in [epochs - 1, 1] if separate else [epochs]:
        part = numpy.array(documents * count, dtype=numpy.int32)
        rng.shuffle(part)
        document_index += part.tolist()
    total = epochs * per_epoch - extra
    n = total // q if drop_last else math.ceil(numpy.float32(total) / numpy.float32(q))
    samples, p, offset = [(0, 0)], 0, 0
    for _ in range(n):
        need = q + extra
        while True:
            available = lengths[document_index[p]] - offset
            need -= available
            if need <= 0:
                offset += need + available - extra
                break
            if p == len(document_index) - 1:
                offset = lengths[document_index[p]] - extra
                break
            p, offset = p + 1, 0
        samples.append((p, offset))
    shuffle: list[int] = []
    for begin, end in [(0, before), (before, n)] if separate else [(0, n)]:
        part = numpy.arange(begin, end, dtype=numpy.uint32)
        rng.shuffle(part)
        shuffle += part.tolist()
    return document_index, samples, shuffle


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    q=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
    wanted=st.one_of(st.none(), st.integers(0, 60)),
    extra=st.integers(0, 1),
    drop_last=st.booleans(),
)
def test_equals_slow_reference(lengths, part, q, seed, wanted, extra, drop_last) -> None:
    begin, end = sorted(int(share * len(lengths)) for share in part)
    documents = list(range(begin, end + 1))[: len(lengths) - begin]
    num_tokens = sum(lengths[d] for d in documents)
    if num_tokens <= extra:
        return
    plan = plan_samples(num_tokens, q, wanted, bool(extra), drop_last)
    sizes = numpy.array(lengths, numpy.int32)
    arrays = build_indices(plan, sizes, numpy.array(documents), q, bool(extra), seed)
    expected = slow_indices(lengths, documents, q, seed, wanted, extra, drop_last)
    assert arrays["document_index"].tolist() == expected[0]
    assert [tuple(row) for row in arrays["sample_index"].tolist()] == expected[1]
    assert arrays["shuffle_index"].tolist() == expected[2]
    assert arrays["document_index"].dtype == arrays["sample_index"].dtype == numpy.int32
    assert arrays["shuffle_index"].dtype == numpy.uint32


def test_shuffle_index_grows_to_64_bits() -> None:
    assert shuffle_dtype(2**32 - 3) is numpy.uint32
    assert shuffle_dtype(2**32 - 2) is numpy.int64


# -- blends --------------------------------------------------------------------------------------------


def slow_blend(weights: list[float], size: int, limits: list[int] | None) -> tuple[list[int], list[int]]:
    counts, datasets, samples = [0] * len(weights), [], []
    for k in range(size):
        best, best_error = -1, -math.inf
        for d, weight in enumerate(weights):
            error = weight * float(max(k, 1)) - counts[d]
            if (limits is None or counts[d] < limits[d]) and error > best_error:
                best, best_error = d, error
        datasets.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return datasets, samples


def blend(weights: list[float], size: int, limits: list[int] | None = None) -> tuple[list[int], list[int]]:
    dataset_index, sample_index = build_blending_indices(
        numpy.array(weights), size, None if limits is None else numpy.array(limits)
    )
    assert dataset_index.dtype == numpy.int16 and sample_index.dtype == numpy.int64
    return dataset_index.tolist(), sample_index.tolist()


def test_blend_of_two() -> None:
    assert blend([0.3, 0.7], 10) == ([1, 0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 2, 1, 3, 4, 2, 5, 6])


def test_blend_of_three() -> None:
    expected = [1, 2, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1], [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 2, 5]
    assert blend([0.2, 0.5, 0.3], 12) == expected


def test_exhaustive_blend() -> None:
    expected = [1, 0, 2, 1, 0, 1, 2, 1, 0, 1], [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]
    assert blend([0.3, 0.5, 0.2], 10, [3, 5, 2]) == expected


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12),
    size=st.one_of(st.integers(0, 300), st.integers(4097, 9000)),
)
def test_blend_equals_slow_reference(weights: list[float], size: int) -> None:
    shares = (numpy.array(weights) / numpy.sum(weights)).tolist()
    assert blend(shares, size) == slow_blend(shares, size, None)


@pytest.mark.parametrize(
    "weights",
    [[1.0, 1e-5, 2e-5, 3e-5], [1, 1, 1, 1], [1, 1, 1, 1e-3, 2e-4], [10.0**-i for i in range(8)]],
)
def test_long_blend_equals_slow_reference(weights: list[float]) -> None:
    # tiny weights: whole segments start from wrong guesses and must be repaired
    shares = (numpy.array(weights) / numpy.sum(weights)).tolist()
    assert blend(shares, 50000) == slow_blend(shares, 50000, None)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=8))
def test_exhaustive_blend_equals_slow_reference(sizes: list[int]) -> None:
    shares = (numpy.array(sizes) / sum(sizes)).tolist()
    assert blend(shares, sum(sizes), sizes) == slow_blend(shares, sum(sizes), sizes)


def test_no_documents_and_no_samples() -> None:
    """The test split of a few documents, where no test samples are asked for."""
    index = build_sample_index(numpy.array([5, 6], numpy.int32), numpy.empty(0, numpy.int32), 4, 0)
    assert index.tolist() == [[0, 0]]
