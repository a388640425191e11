import math
from pathlib import Path

import pytest
import torch

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import compile_helpers, get_blend_from_list, normalize
from tests.unit_tests.datasets.data_files import gpt_config, random_documents, write_dataset
from tests.worker_pool import run_ranks


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    return [write_dataset(tmp_path / name, random_documents(60, seed=i)) for i, name in enumerate("abc")]


def build(config: GPTDatasetConfig, sizes: list[int | None], cls: type = GPTDataset) -> list:
    return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()


# -- rules ---------------------------------------------------------------------------------------------


def test_split_matrix() -> None:
    assert convert_split_vector_to_split_matrix(parse_and_normalize_split("99,1,0")) == [
        (0, 0.99),
        (0.99, 1.0),
        None,
    ]
    assert parse_and_normalize_split("969, 30, 1") == normalize([969.0, 30.0, 1.0])
    assert parse_and_normalize_split("100") == [1.0, 0.0, 0.0]
    common = convert_split_vector_to_split_matrix([0.5, 0.5, 0.0], [0.25, 0.25, 0.5])
    assert common == [(0, 0.25), None, None]
    for wrong in ("", "0,0,0", "1,1,1,1"):
        with pytest.raises(ValueError):
            parse_and_normalize_split(wrong)


def test_blend_list() -> None:
    assert get_blend_from_list(None) is None
    assert get_blend_from_list(["a "]) == (["a"], None)
    assert get_blend_from_list(["a", "b", "c"]) == (["a", "b", "c"], None)
    assert get_blend_from_list(["0.3", "a", "70", " b"]) == (["a", "b"], [0.3, 70.0])
    assert get_blend_from_list(["a", "b"]) == (["a", "b"], None)
    with pytest.raises(ValueError, match=r"\['a'\] stand where a weight is expected"):
        get_blend_from_list(["0.3", "x", "a", "b"])
    assert compile_helpers() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blend": (["a"], None)}, "blend needs split"),
        ({"blend": (["a", "b"], [1.0]), "split": "1"}, "2 datasets but 1 weights"),
        ({"blend": (["a", "b"], [1.0, 0.0]), "split": "1"}, "every weight must be positive"),
        ({"blend": ([], None), "split": "1"}, "names no dataset"),
        ({"blend_per_split": [(["a"], None)]}, "needs 3 entries"),
        ({"blend_per_split": [(["a"], None), None, None], "split": "1"}, "split and blend_per_split exclude"),
        ({"blend_per_split": [(["a"], None), None, None], "blend": (["a"], None)}, "exclude each other"),
        ({"sequence_length": 0}, "at least 1"),
    ],
)
def test_bad_configurations(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt_config(**settings)


# -- what is built -------------------------------------------------------------------------------------


def test_one_dataset_is_split_by_documents(prefixes: list[str]) -> None:
    config = gpt_config(blend=(prefixes[:1], None), split="80,15,5")
    train, valid, test = build(config, [10, 5, None])
    assert all(isinstance(dataset, GPTDataset) for dataset in (train, valid, test))
    assert train.indices.tolist() == list(range(48))
    assert valid.indices.tolist() == list(range(48, 57))
    assert test.indices.tolist() == list(range(57, 60))
    assert len(train) >= 10 and len(valid) >= 5


def test_empty_splits_are_none(prefixes: list[str]) -> None:
    config = gpt_config(blend=(prefixes[:1], None), split="1,0,0")
    train, valid, test = build(config, [10, 10, 10])
    assert len(train) >= 10 and valid is None and test is None


def test_weighted_blend(prefixes: list[str]) -> None:
    config = gpt_config(blend=(prefixes, [1.0, 2.0, 5.0]), split="90,10,0")
    train, valid, _ = build(config, [101, 7, 0])
    assert isinstance(train, BlendedDataset)
    assert len(train) == 13 + 26 + 64
    assert [dataset.num_samples for dataset in train.datasets] == [math.ceil(n * 1.005) for n in (13, 26, 64)]
    counts = torch.bincount(torch.tensor([train[k]["dataset_id"] for k in range(len(train))]))
    assert all(abs(int(count) - len(train) * share) <= 1 for count, share in zip(counts, (0.125, 0.25, 0.625)))
    for k in range(0, len(train), 10):
        item = train[k]
        source = train.datasets[item["dataset_id"]][int(train.dataset_sample_index[k])]
        assert torch.equal(item["tokens"], source["tokens"])
    assert len(valid) == 1 + 2 + 5


def test_unweighted_blend_reads_everything_once(prefixes: list[str]) -> None:
    config = gpt_config(blend=(prefixes, None), split="1,0,0")
    (limited, _, _), (whole, _, _) = build(config, [50, 0, 0]), build(config, [None] * 3)
    lengths = [len(dataset) for dataset in whole.datasets]
    assert len(limited) == 50 and len(whole) == sum(lengths)
    pairs = list(zip(whole.dataset_index.tolist(), whole.dataset_sample_index.tolist()))
    assert sorted(pairs) == [(d, i) for d, length in enumerate(lengths) for i in range(length)]


def test_blend_per_split(prefixes: list[str]) -> None:
    config = gpt_config(blend_per_split=[(prefixes[:2], [1.0, 3.0]), (prefixes[2:], [1.0]), None])
    train, valid, test = build(config, [20, 10, 5])
    assert isinstance(train, BlendedDataset) and len(train) == 20
    assert isinstance(valid, GPTDataset) and len(valid.indices) == 60
    assert test is None


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(prefixes: list[str], num_threads: int) -> None:
    config = gpt_config(blend=(prefixes, [1.0, 1.0, 1.0]), split="1,1,1", num_dataset_builder_threads=num_threads)
    train, _, test = build(config, [30, 30, 30])
    assert train.dataset_index.tolist() == [0, 1, 2] * 10
    assert [dataset.dataset_path for dataset in test.datasets] == prefixes


def test_mock() -> None:
    config = gpt_config(sequence_length=32)
    datasets = build(config, [100, 10, 10], MockGPTDataset)
    assert [type(dataset) for dataset in datasets] == [MockGPTDataset] * 3
    assert [int(dataset.indices[0]) for dataset in datasets] == [0, 33333, 66667]
    with pytest.raises(ValueError, match="no data is given: name a dataset with --data-path"):
        build(config, [1, 1, 1])


def test_blend_index_is_cached(prefixes: list[str], tmp_path: Path) -> None:
    config = gpt_config(blend=(prefixes, [1.0, 2.0, 5.0]), split="1,0,0", path_to_cache=str(tmp_path / "cache"))
    first, again = (build(config, [40, 0, 0])[0] for _ in range(2))
    assert first.built_anew_on_cache_miss and not again.built_anew_on_cache_miss
    assert again.dataset_index.tolist() == first.dataset_index.tolist()
    start = f"{first.unique_description_hash}-BlendedDataset-train-"
    names = sorted(path.name.removeprefix(start) for path in (tmp_path / "cache").glob("*Blended*"))
    assert names == ["dataset_index.npy", "dataset_sample_index.npy", "description.txt", "manifest.json"]
    (tmp_path / "cache" / f"{start}dataset_index.npy").write_bytes(b"")
    assert build(config, [40, 0, 0])[0].dataset_index.tolist() == first.dataset_index.tolist()


def test_blend_that_needs_too_much_is_refused(prefixes: list[str]) -> None:
    config = gpt_config(blend=(prefixes[:1], None), split="1,0,0")
    dataset = build(config, [None] * 3)[0]
    with pytest.raises(IndexError, match=r"takes 1000 from .*/a, which has \d+: raise --mid-level-dataset"):
        BlendedDataset([dataset], [1.0], 1000, config)
    with pytest.raises(ValueError, match="must be positive"):
        BlendedDataset([dataset, dataset], [1.0, 0.0], 10, config)


# -- several ranks -------------------------------------------------------------------------------------


def build_on_rank(prefixes: list[str], ranks: list[int]) -> tuple[bool, list[int]] | None:
    rank = torch.distributed.get_rank()
    config = gpt_config(blend=(prefixes, [1.0, 2.0, 5.0]), split="1,0,0")
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: rank in ranks, config)
    dataset = builder.build()[0]
    if dataset is None:
        return None
    built = any(source.built_anew_on_cache_miss for source in dataset.datasets)
    return built, [int(dataset[k]["tokens"].sum()) for k in range(len(dataset))]


def test_rank_zero_builds_and_the_others_load(prefixes: list[str]) -> None:
    zero, one, two = run_ranks(3, build_on_rank, prefixes, [0, 2])
    assert one is None
    assert zero[0] and not two[0]
    assert zero[1] == two[1]


def error_on_rank(prefixes: list[str], bad_rank: int) -> str:
    rank = torch.distributed.get_rank()
    blend = (["/nowhere/data"] if rank == bad_rank else prefixes[:1], None)
    config = gpt_config(blend=blend, split="1,0,0")
    with pytest.raises((FileNotFoundError, RuntimeError)) as caught:
        BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, config).build()
    torch.distributed.barrier()  # every rank gets here: none was left waiting
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_error_on_one_rank_reaches_all(prefixes: list[str], bad_rank: int) -> None:
    messages = run_ranks(2, error_on_rank, prefixes, bad_rank)
    assert messages[bad_rank].startswith("FileNotFoundError: dataset /nowhere/data")
    expected = f"RuntimeError: rank {bad_rank} failed: FileNotFoundError: dataset /nowhere/data"
    assert messages[1 - bad_rank].startswith(expected)
