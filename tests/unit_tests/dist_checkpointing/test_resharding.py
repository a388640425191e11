"""What one layout saves, every other one loads, bitwise."""

import itertools
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.resharding import boxes_of_range
from tests.unit_tests.dist_checkpointing.layouts import (
    GLOBAL_SHAPES,
    Layout,
    assert_loaded,
    blank,
    global_tensor,
    local_state,
)
from tests.worker_pool import run_ranks

LAYOUTS = [
    Layout(),
    Layout(flat=True),
    Layout(tp=2),
    Layout(tp=2, flat=True),
    Layout(tp=4, flat=True),
    Layout(pp=2, flat=True),
    Layout(pp=4),
    Layout(dp=3, flat=True),
    Layout(tp=2, dp=2, flat=True),
    Layout(tp=2, pp=2),
]


def save_all(layout: Layout, directory: str, backend: str = "torch_dist") -> None:
    rank = dist.get_rank()
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(backend))
    dist_checkpointing.save(local_state(layout, rank), directory, strategy)


def load_all(layout: Layout, directory: str, same_grid: bool) -> None:
    expected = local_state(layout, dist.get_rank())
    if not same_grid:
        del expected["rng"]  # objects belong to one grid
    loaded = dist_checkpointing.load(blank(expected), directory)
    assert_loaded(loaded, expected)


def load_shared(layout: Layout, directory: str) -> list[str]:
    """Names read from the disk by each rank, when ranks read for each other."""
    from megatron.core.dist_checkpointing.strategies import sharded_files as strategy

    expected = local_state(layout, dist.get_rank())
    del expected["rng"]
    read: list[str] = []
    original = strategy.plan_load

    def count(values: list, metadata: object) -> dict:
        read.extend(value.key for value in values)
        return original(values, metadata)

    strategy.plan_load = count
    try:
        wrapper = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(directory))
        assert_loaded(dist_checkpointing.load(blank(expected), directory, wrapper), expected)
    finally:
        strategy.plan_load = original
    return read


@pytest.mark.parametrize("reader", [Layout(dp=3), Layout(tp=2, dp=2, flat=True), Layout(dp=2, pp=2)], ids=str)
def test_ranks_may_read_for_each_other(saved: dict[Layout, str], reader: Layout) -> None:
    reads = run_ranks(reader.size, load_shared, reader, saved[Layout(tp=2, pp=2)])
    alone = len(run_ranks(1, load_shared, Layout(), saved[Layout(tp=2, pp=2)])[0])
    assert all(0 < len(names) < alone for names in reads)
    assert sum(map(len, reads)) < alone * reader.size


def load_each(layout: Layout, directories: dict[Layout, str]) -> None:
    for writer, directory in directories.items():
        load_all(layout, directory, same_grid=(writer.tp, writer.pp) == (layout.tp, layout.pp))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, str]:
    directories = {}
    for layout, backend in zip(LAYOUTS, itertools.cycle(["torch_dist", "safetensors"])):
        directory = tmp_path_factory.mktemp("checkpoint")
        run_ranks(layout.size, save_all, layout, str(directory), backend)
        directories[layout] = str(directory)
    return directories


@pytest.mark.parametrize("reader", LAYOUTS, ids=str)
def test_any_layout_reads_what_any_other_wrote(saved: dict[Layout, str], reader: Layout) -> None:
    run_ranks(reader.size, load_each, reader, saved)


def test_every_layout_stores_the_same_global_tensors(saved: dict[Layout, str]) -> None:
    for directory in saved.values():
        tensors = dist_checkpointing.load_plain_tensors(directory)
        assert set(tensors) == {*GLOBAL_SHAPES, *(f"exp_avg.{key}" for key in GLOBAL_SHAPES)}
        for key in GLOBAL_SHAPES:
            assert torch.equal(tensors[key], global_tensor(key)), key
            assert torch.equal(tensors[f"exp_avg.{key}"], global_tensor(key, "exp_avg.")), key


@pytest.mark.parametrize("writer", [Layout(padded_vocab=16), Layout(tp=2, dp=2, flat=True, padded_vocab=20)], ids=str)
@pytest.mark.parametrize("padded_vocab", [12, 16, 24])
def test_padding_of_the_vocabulary_may_change(tmp_path: Path, writer: Layout, padded_vocab: int) -> None:
    run_ranks(writer.size, save_all, writer, str(tmp_path))
    for reader in (Layout(tp=2, flat=True), Layout(tp=4)):
        run_ranks(reader.size, load_all, replace(reader, padded_vocab=padded_vocab), str(tmp_path), False)


def test_shrinking_below_the_vocabulary_reads_the_overlap(tmp_path: Path) -> None:
    run_ranks(1, save_all, Layout(), str(tmp_path))
    run_ranks(2, load_all, Layout(tp=2, flat=True, padded_vocab=8), str(tmp_path), False)


def test_ranges_of_a_box_decompose_into_few_disjoint_boxes() -> None:
    for shape in [(), (5,), (3, 4), (2, 3, 2), (1, 1, 3), (2, 1, 2, 2)]:
        total = prod(shape)
        index = torch.arange(total).reshape(shape)
        for start, stop in itertools.combinations(range(total + 1), 2):
            boxes = list(boxes_of_range(shape, start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            elements = torch.cat(
                [index[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes))].reshape(-1) for b in boxes]
            )
            assert elements.tolist() == list(range(start, stop))
        assert list(boxes_of_range(shape, 0, 0)) == []


def save_ranges(directory: str, cut: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(60.0).reshape(6, 10)
    bounds = [0, cut, 60]
    part = whole.reshape(-1)[bounds[rank] : bounds[rank + 1]].clone()
    shard = ShardedTensor.from_rank_offsets_flat(
        "w", part, (6, 10), flattened_range=slice(bounds[rank], bounds[rank + 1])
    )
    assert size == 2
    dist_checkpointing.save({"w": shard}, directory)


@pytest.mark.parametrize("cut", [0, 1, 10, 37, 60])
def test_ranges_of_any_length_load_into_any_box(tmp_path: Path, cut: int) -> None:
    run_ranks(2, save_ranges, str(tmp_path), cut)
    whole = torch.arange(60.0).reshape(6, 10)
    for grid in [(1, 1), (2, 1), (1, 2), (3, 5), (6, 10)]:
        for i, j in itertools.product(*map(range, grid)):
            box = whole.chunk(grid[0], 0)[i].chunk(grid[1], 1)[j]
            request = ShardedTensor.from_rank_offsets(
                "w", torch.full(box.shape, torch.nan), (0, i, grid[0]), (1, j, grid[1])
            )
            loaded = dist_checkpointing.load({"w": request}, tmp_path, validate_access_integrity=False)
            assert torch.equal(loaded["w"], box)


def test_strided_destinations_are_filled_in_place(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", whole)}, tmp_path)
    memory = torch.zeros(4, 6)
    view = memory[:, ::2].t()
    dist_checkpointing.load({"w": ShardedTensor.from_rank_offsets("w", view)}, tmp_path)
    assert torch.equal(view, whole)
    assert memory[:, 1::2].abs().sum() == 0


def test_types_are_converted_to_the_requested_one(tmp_path: Path) -> None:
    whole = torch.randn(3, 4)
    dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", whole)}, tmp_path)
    request = ShardedTensor.from_rank_offsets("w", torch.empty(3, 4, dtype=torch.bfloat16))
    assert torch.equal(dist_checkpointing.load({"w": request}, tmp_path)["w"], whole.bfloat16())
