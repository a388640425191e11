"""Whole runs of random documents, seeds, epochs, splits and blends against the sampling rules written out slowly."""

import math
from pathlib import Path

import numpy
import pytest

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from tests.unit_tests.datasets.data_files import gpt_config, random_documents, write_dataset
from tests.unit_tests.datasets.test_sample_index import slow_blend, slow_indices

SPLITS = ("1", "80,20", "60, 30, 10", "1,1,1", "0.5,0,0.5")


def slow_samples(documents: list[list[int]], chosen: list[int], q: int, seed: int, wanted: int | None) -> list[list]:
    """The samples of one dataset in the order in which they are given out, with one extra token each."""
    lengths = list(map(len, documents))
    order, samples, shuffle = slow_indices(lengths, chosen, q, seed, wanted, 1, True)
    stream = [token for document in order for token in documents[document]]
    return [stream[q * row : q * (row + 1) + 1] for row in shuffle]


def bounds_of(split: str, num_documents: int) -> list[list[int]]:
    """The documents of each split."""
    numbers = [float(number) for number in split.split(",")] + [0.0, 0.0]
    shares = [number / sum(numbers) for number in numbers[:3]]
    ends = [0, shares[0], shares[0] + shares[1], shares[0] + shares[1] + shares[2]]
    rounded = [int(round(end * num_documents)) for end in ends]
    return [list(range(begin, end)) for begin, end in zip(rounded[:-1], rounded[1:])]


@pytest.mark.parametrize("case", [*range(15), *(pytest.param(case, marks=pytest.mark.slow) for case in range(15, 200))])
def test_runs_follow_the_rules(case: int, tmp_path: Path) -> None:
    rng = numpy.random.default_rng(case)
    q, seed = int(rng.integers(3, 40)), int(rng.integers(1, 2**31))
    split = SPLITS[case % len(SPLITS)]
    num_sources = int(rng.integers(1, 5))
    corpora = [random_documents(int(rng.integers(40, 80)), seed=100 * case + i) for i in range(num_sources)]
    prefixes = [write_dataset(tmp_path / str(i), documents) for i, documents in enumerate(corpora)]
    weights = rng.uniform(0.05, 5, num_sources).tolist() if rng.random() < 0.6 else None
    sizes = [int(size) for size in rng.integers(1, 200, 3)]
    if weights is None and rng.random() < 0.5:
        sizes = [None] * 3
    config = gpt_config(
        blend=(prefixes, weights),
        split=split,
        sequence_length=q,
        random_seed=seed,
        num_dataset_builder_threads=1 + case % 2,
        path_to_cache=str(tmp_path / "cache") if case % 3 else None,
    )
    for _ in range(2):  # built, then loaded
        datasets = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        for i, (dataset, size) in enumerate(zip(datasets, sizes)):
            chosen = [bounds_of(split, len(documents))[i] for documents in corpora]
            if not chosen[0]:
                assert dataset is None
                continue
            expected = slow_run(corpora, chosen, weights, size, q, seed)
            assert isinstance(dataset, BlendedDataset) == (num_sources > 1 or weights is not None)
            assert len(dataset) == len(expected)
            for k, text in enumerate(expected):
                item = dataset[k]
                assert [*item["tokens"].tolist(), int(item["labels"][-1])] == text, (case, i, k)


def slow_run(
    corpora: list, chosen: list, weights: list[float] | None, size: int | None, q: int, seed: int
) -> list[list[int]]:
    """The samples of one split of a run."""
    if weights is None:
        wanted = [size if len(corpora) == 1 else None] * len(corpora)
    else:
        shares = (numpy.array(weights) / numpy.sum(weights)).tolist()
        wanted = [math.ceil(math.ceil(size * share) * (1 + 0.005)) for share in shares]
    sources = [slow_samples(docs, part, q, seed, n) for docs, part, n in zip(corpora, chosen, wanted)]
    if weights is None and len(corpora) == 1:
        return sources[0]
    limits = None
    if weights is None:
        lengths = list(map(len, sources))
        shares = (numpy.array(lengths) / numpy.sum(lengths)).tolist()
        total = sum(lengths) if size is None else min(size, sum(lengths))
        limits = lengths if size is None else None
    else:
        total = sum(math.ceil(size * share) for share in shares)
    datasets, samples = slow_blend(shares, total, limits)
    return [sources[d][k] for d, k in zip(datasets, samples)]
