"""Blocks of sentences and the queries taken out of them: published vectors, and what must hold for every sample."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest

from megatron.core.datasets.block_index import BlockCutting, build_block_index, cut_blocks
from megatron.core.datasets.ict_dataset import ICTDataset, ICTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split
from tests.unit_tests.datasets.test_masked_datasets import CLS, PAD, SEP, WordPieces

LENGTH = 32


@pytest.mark.parametrize(
    ("min_num_sentences", "expected"),
    [
        (2, [[5, 9, 2, 2], [2, 4, 0, 1], [9, 12, 3, 3], [0, 2, 0, 0]]),
        (1, [[0, 2, 0, 0], [4, 5, 1, 2], [9, 12, 3, 4], [2, 4, 0, 1], [5, 9, 2, 3]]),
    ],
)
def test_published_block_index(min_num_sentences: int, expected: list[list[int]]) -> None:
    starts = numpy.array([0, 4, 5, 9, 12])
    lengths = numpy.array([10, 12, 8, 20, 30, 5, 6, 7, 9, 14, 3, 11])
    one_pass = cut_blocks(starts, lengths, numpy.array([2, 3, 1, 4]), BlockCutting(24, min_num_sentences))
    assert build_block_index(one_pass, 1, seed=1).tolist() == expected
    three = build_block_index(one_pass, 2 * len(one_pass) + 1, seed=1)
    assert sorted(three.tolist()) == sorted(3 * one_pass.tolist())


def cut_one_by_one(
    starts: list[int], lengths: list[int], titles: list[int], target: int, least: int
) -> list[list[int]]:
    """The rule, sentence by sentence."""
    rows = []
    for document, (begin, stop) in enumerate(zip(starts, starts[1:])):
        if stop - begin < least or any(length > 512 for length in lengths[begin:stop]):
            continue
        first = begin
        for i in range(begin, stop):
            left, full = stop - i - 1, sum(lengths[first : i + 1]) >= target - titles[document]
            if left == 0 or (full and left >= least and i + 1 - first >= least):
                rows.append([first, i + 1, document, len(rows)])
                first = i + 1
    return rows


@pytest.mark.parametrize("least", [1, 2])
def test_blocks_follow_the_rule(least: int) -> None:
    generator = random.Random(least)
    sizes = [generator.randrange(0, 30) for _ in range(60)]
    starts = numpy.cumsum([0, *sizes])
    lengths = numpy.array([generator.choice([1, 5, 9, 20, 60]) for _ in range(starts[-1])])
    lengths[int(starts[7])] = 600
    titles = numpy.array([generator.randrange(0, 50) for _ in sizes])
    found = cut_blocks(starts, lengths, titles, BlockCutting(45, least)).tolist()
    assert found == cut_one_by_one(starts.tolist(), lengths.tolist(), titles.tolist(), 45, least)


def test_no_sentences_no_blocks() -> None:
    nothing = cut_blocks(numpy.array([0, 1, 2]), numpy.array([5, 5]), numpy.zeros(2, int), BlockCutting(24, 2))
    with pytest.raises(ValueError, match="--split-sentences.*--use-one-sent-docs"):
        build_block_index(nothing, 1, seed=1)


def write(path: Path, documents: list[list[list[int]]]) -> str:
    builder = IndexedDatasetBuilder(get_bin_path(str(path)), dtype=numpy.uint16)
    for sentences in documents:
        flat = [token for sentence in sentences for token in sentence]
        builder.add_document(numpy.array(flat), [len(sentence) for sentence in sentences])
    builder.finalize(get_idx_path(str(path)))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Bodies whose tokens are 10 plus the number of their document, and titles with 60 more."""
    directory, generator = tmp_path_factory.mktemp("corpus"), random.Random(3)
    bodies = [
        [[10 + document] * generator.randrange(3, 12) for _ in range(generator.randrange(2, 9))]
        for document in range(20)
    ]
    titles = [[[70 + document] * 2, [70 + document]] for document in range(20)]  # some titles are two sentences
    return write(directory / "bodies", bodies), write(directory / "titles", titles)


def dataset(corpus: tuple[str, str], documents: range = range(20), **changes: object) -> ICTDataset:
    settings = {"random_seed": 5, "sequence_length": LENGTH, "split": "1,0,0", "titles_path": corpus[1]}
    config = ICTDatasetConfig(blend=([corpus[0]], None), tokenizer=WordPieces("v"), **(settings | changes))  # type: ignore[arg-type]
    data = ICTDataset.build_low_level_dataset(corpus[0], config)
    indices = numpy.arange(documents.start, documents.stop, dtype=numpy.int32)
    return ICTDataset(data, corpus[0], indices, 100, Split.train, config)


def test_samples_are_a_sentence_and_its_block(corpus: tuple[str, str]) -> None:
    data = dataset(corpus, range(5, 20))  # titles are those of the same documents in a later part, too
    assert len(data) >= 100 and data.built_anew_on_cache_miss
    kept = 0
    for i in range(len(data)):
        item = data[i]
        first, end, document, _ = item["block_data"].tolist()
        query = item["query_tokens"][item["query_pad_mask"] == 1].tolist()
        context = item["context_tokens"][item["context_pad_mask"] == 1].tolist()
        assert item["query_tokens"].shape == item["context_tokens"].shape == (LENGTH,)
        assert all(
            (item[f"{name}_tokens"][item[f"{name}_pad_mask"] == 0] == PAD).all() for name in ("query", "context")
        )
        token = 10 + 5 + document
        assert [query[0], query[-1]] == [CLS, SEP] and set(query[1:-1]) == {token}
        assert context[:5] == [CLS, *[token + 60] * 3, SEP] and context[-1] == SEP
        whole = sum(data.dataset.sequence_lengths[first:end])
        lengths = {min(LENGTH, 6 + whole), min(LENGTH, 6 + whole - (len(query) - 2))}
        assert len(context) in lengths and set(context[5:-1]) <= {token}
        kept += len(context) == max(lengths) and len(lengths) == 2
    assert 0 < kept < 0.3 * len(data)
    again = dataset(corpus, range(5, 20))
    assert not again.built_anew_on_cache_miss
    assert all((again[7][name] == value).all() for name, value in data[7].items())


def test_queries_can_always_or_never_stay(corpus: tuple[str, str]) -> None:
    always, never = (dataset(corpus, query_in_block_probability=p, sequence_length=200) for p in (1.0, 0.0))
    for i in range(20):
        stays, goes = always[i], never[i]
        sizes = [item["context_pad_mask"].sum() for item in (stays, goes)]
        assert sizes[0] - sizes[1] == stays["query_pad_mask"].sum() - 2
        assert (always.whole_block(always.block_index[i])[0] == stays["context_tokens"]).all()


def test_titles_are_optional_but_must_fit(corpus: tuple[str, str], tmp_path: Path) -> None:
    context = dataset(corpus, titles_path=None)[0]["context_tokens"]
    assert context[0] == CLS and context[1] < 70 and (context == SEP).sum() == 1
    with pytest.raises(ValueError, match="has 1 titles for the 20 documents of .*--json-keys text title"):
        dataset(corpus, titles_path=write(tmp_path / "few", [[[5]]]))
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        dataset(corpus, query_in_block_probability=2)


def test_a_title_that_fills_the_sequence_leaves_no_error(corpus: tuple[str, str]) -> None:
    item = dataset(corpus, sequence_length=4)[0]
    assert item["context_tokens"].tolist()[0] == CLS and item["context_tokens"].tolist()[-1] == SEP
