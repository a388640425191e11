"""What a checkpoint contains, how it is refused when it does not fit, and what other software sees in it."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import (
    get_default_save_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from tests.worker_pool import run_ranks


def tensor(key: str, *shape: int, fill: float | None = None) -> ShardedTensor:
    numel = torch.Size(shape).numel()
    data = torch.arange(float(numel)).reshape(shape) if fill is None else torch.full(shape, fill)
    return ShardedTensor.from_rank_offsets(key, data)


def test_files_and_names_of_the_format(tmp_path: Path) -> None:
    state = {
        "w": ShardedTensor.from_rank_offsets(
            "layers.w", torch.ones(3), (0, 1, 2), prepend_axis_num=1, replica_id=(0, 0, 0)
        ),
        "w0": ShardedTensor.from_rank_offsets(
            "layers.w", torch.ones(3), (0, 0, 2), prepend_axis_num=1, replica_id=(0, 0, 0)
        ),
        "m": ShardedTensor.from_rank_offsets_flat("m", torch.ones(6), (2, 3), flattened_range=slice(0, 6)),
        "rng": ShardedObject("rng_state", [1], (1, 1), (0, 0)),
        "iteration": 3,
    }
    dist_checkpointing.save(state, tmp_path, content_metadata={"kind": "x"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"common.pt", "metadata.json", "manifest.json", ".metadata", "__0_0.distcp", "__0_1.distcp"}
    assert json.loads((tmp_path / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    stored = metadata.state_dict_metadata
    assert set(stored) == {"layers.w", "m", "rng_state/shard_0.0_1.1"}
    assert stored["layers.w"].size == torch.Size([2, 3])
    assert sorted(tuple(chunk.offsets) for chunk in stored["layers.w"].chunks) == [(0, 0), (1, 0)]
    assert stored["m"].size == torch.Size([1, 1, 6])
    assert metadata.mcore_data == {"m": {"nd_reformulated_orig_global_shape": (2, 3)}, "layers.w": {}}
    assert torch.load(tmp_path / "common.pt", weights_only=True) == {
        "iteration": 3,
        "content_metadata": {"kind": "x"},
    }
    assert dist_checkpointing.load_content_metadata(tmp_path) == {"kind": "x"}
    assert dist_checkpointing.check_is_distributed_checkpoint(tmp_path)


def save_rows(directory: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = torch.arange(12.0).reshape(4, 3).chunk(size)[rank]
    dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", rows, (0, rank, size))}, directory)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_our_directories(tmp_path: Path) -> None:
    run_ranks(2, save_rows, str(tmp_path))
    state = {"w": torch.zeros(4, 3)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["w"], torch.arange(12.0).reshape(4, 3))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_we_read_tensors_that_torch_wrote(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({}, tmp_path / "common.pt")
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    assert torch.equal(dist_checkpointing.load_plain_tensors(tmp_path)["w"], torch.arange(6.0))


def test_lists_values_and_local_objects_come_back_as_they_were(tmp_path: Path) -> None:
    def state(fill: float | None = None) -> dict:
        return {
            "groups": [
                {"lr": 0.1, "params": LocalNonpersistentObject([1, 2])},
                {"lr": 0.2, "params": LocalNonpersistentObject([3])},
            ],
            "mixed": [tensor("a", 2, fill=fill), 5, [tensor("b", 1, fill=fill)]],
            "main": [[tensor("c", 2, fill=fill), tensor("d", 3, fill=fill)], [tensor("e", 1, fill=fill)]],
            "nothing": [],
            "chained": {0: {"x": tensor("f", 1, fill=fill)}, 1: {"x": 2}},
        }

    dist_checkpointing.save(state(), tmp_path)
    common = dist_checkpointing.load_common_state_dict(tmp_path)
    assert common["groups"] == [{"lr": 0.1}, {"lr": 0.2}]
    loaded = dist_checkpointing.load(state(-1.0), tmp_path)
    assert loaded["groups"] == [{"lr": 0.1, "params": [1, 2]}, {"lr": 0.2, "params": [3]}]
    assert loaded["mixed"][1] == 5 and torch.equal(loaded["mixed"][2][0], torch.zeros(1))
    assert [[t.numel() for t in group] for group in loaded["main"]] == [[2, 3], [1]]
    assert loaded["nothing"] == [] and loaded["chained"][1] == {"x": 2}


def test_factories_build_on_the_way_out_and_merge_on_the_way_in(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, replica_id: object, flattened_range: slice | None) -> dict:
        halves = data.chunk(2)
        return {name: ShardedTensor.from_rank_offsets(f"{key}.{name}", half) for name, half in zip("xy", halves)}

    def merge(parts: dict) -> torch.Tensor:
        return torch.cat([parts["x"], parts["y"]])

    data = torch.arange(8.0)
    dist_checkpointing.save({"w": ShardedTensorFactory("w", data, build, merge)}, tmp_path)
    assert set(dist_checkpointing.load_tensors_metadata(tmp_path)) == {"w.x", "w.y"}
    request = ShardedTensorFactory("w", torch.zeros(8), build, merge)
    assert torch.equal(dist_checkpointing.load({"w": request}, tmp_path)["w"], data)
    absent = ShardedTensorFactory("other", torch.zeros(8), build, merge)
    loaded = dist_checkpointing.load({"w": request, "o": absent}, tmp_path, strict="ignore_all")
    assert set(loaded) == {"w"}


def test_another_architecture_is_refused_with_every_difference(tmp_path: Path) -> None:
    dist_checkpointing.save({"a": tensor("a", 4, 2), "b": tensor("b", 3), "c": tensor("c", 1)}, tmp_path)
    request = {"a": tensor("a", 4, 3, fill=7.0), "b": tensor("b", 3, fill=7.0), "d": tensor("d", 2)}
    with pytest.raises(CheckpointingException) as error:
        dist_checkpointing.load(request, tmp_path)
    assert "a: shape [4, 2] in the checkpoint, [4, 3] expected" in str(error.value)
    assert "d: not in the checkpoint" in str(error.value)
    assert bool((request["b"].data == 7.0).all()), "a refused load must not change anything"


@pytest.mark.parametrize(
    "mode",
    [
        "raise_unexpected",
        "raise_all",
        "log_unexpected",
        "log_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ],
)
def test_strictness(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    dist_checkpointing.save({"a": tensor("a", 2), "only_saved": tensor("only_saved", 1)}, tmp_path)
    request = {"a": tensor("a", 2, fill=0.0), "more": {"only_asked": tensor("only_asked", 1)}}
    caplog.set_level(logging.WARNING)
    if mode.startswith("raise"):
        with pytest.raises(CheckpointingException, match="only_asked") as error:
            dist_checkpointing.load(request, tmp_path, strict=mode)
        assert ("only_saved" in str(error.value)) == (mode == "raise_all")
        return
    loaded = dist_checkpointing.load(request, tmp_path, strict=mode)
    if mode.startswith("return"):
        loaded, missing, unexpected = loaded
        assert unexpected == {"only_asked"}
        assert missing == ({"only_saved"} if mode == "return_all" else set())
    assert ("only_asked" in caplog.text) == mode.startswith("log")
    assert ("only_saved" in caplog.text) == (mode == "log_all")
    assert torch.equal(loaded["a"], torch.arange(2.0)) and "only_asked" not in loaded.get("more", {})


def test_unknown_strictness_is_refused(tmp_path: Path) -> None:
    dist_checkpointing.save({"a": tensor("a", 2)}, tmp_path)
    with pytest.raises(ValueError, match="'lenient' is none of"):
        dist_checkpointing.load({}, tmp_path, strict="lenient")


def save_bad(kind: str, directory: str) -> str:
    rank = dist.get_rank()
    two = torch.zeros(2)
    shards = {
        "duplicate": lambda: ShardedTensor.from_rank_offsets("w", two, (0, 0, 2)),
        "missing": lambda: ShardedTensor.from_rank_offsets("w", two, (0, rank, 3)),
        "no main replica": lambda: ShardedTensor.from_rank_offsets("w", two, (0, rank, 2), replica_id=rank),
        "shape": lambda: ShardedTensor.from_rank_offsets("w", torch.zeros(2 + rank), (0, rank, 2)),
        "dtype": lambda: ShardedTensor.from_rank_offsets(
            "w", two.to([torch.float32, torch.float64][rank]), (0, rank, 2)
        ),
        "gap": lambda: ShardedTensor.from_rank_offsets_flat(
            "w", torch.zeros(3), (8,), flattened_range=[slice(0, 3), slice(5, 8)][rank]
        ),
        "overlap": lambda: ShardedTensor.from_rank_offsets_flat(
            "w", torch.zeros(5), (8,), flattened_range=[slice(0, 5), slice(3, 8)][rank]
        ),
        "irregular": lambda: ShardedTensor("w", torch.zeros(3), torch.float32, (3,), (6,), (2 * rank,), None),
        "object": lambda: ShardedObject("w", 1, (3,), (rank,)),
        "two objects": lambda: ShardedObject("w", 1, (1,), (0,)),
    }
    try:
        dist_checkpointing.save({"w": shards[kind]()}, directory)
    except CheckpointingException as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("duplicate", "2 main replicas of the shard at (0,), expected 1"),
        ("missing", "shards cover 4 of 6 elements"),
        ("no main replica", "shards cover 2 of 4 elements"),
        ("shape", "ranks disagree on its global_shape"),
        ("dtype", "ranks disagree on its dtype"),
        ("gap", "elements 3 to 5 of shard (0,) are missing"),
        ("overlap", "elements 3 to 5 of shard (0,) are duplicate"),
        ("irregular", "shards overlap"),
        ("object", "2 of 3 objects are there"),
        ("two objects", "2 main replicas of object (0,), expected 1"),
    ],
)
def test_shards_that_do_not_tile_are_refused_on_all_ranks(tmp_path: Path, kind: str, message: str) -> None:
    first, second = run_ranks(2, save_bad, kind, str(tmp_path))
    assert message in first and first == second
    assert list(tmp_path.iterdir()) == []


def save_replicated(directory: str) -> None:
    shards = {
        f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", torch.full((10, 10), float(i)), replica_id=dist.get_rank())
        for i in range(8)
    }
    dist_checkpointing.save(shards, directory, FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy()))


def test_replicated_work_is_spread_evenly(tmp_path: Path) -> None:
    run_ranks(4, save_replicated, str(tmp_path))
    sizes = [sum(p.stat().st_size for p in tmp_path.glob(f"__{rank}_*")) for rank in range(4)]
    assert min(sizes) > 0 and max(sizes) < 1.1 * min(sizes)
    assert set(dist_checkpointing.load_plain_tensors(tmp_path)) == {f"w{i}" for i in range(8)}


def test_removing_tensors_by_prefix(tmp_path: Path) -> None:
    state = {
        "a": tensor("optimizer.a", 4),
        "b": tensor("model.b", 4),
        "o": ShardedObject("optimizer.o", 1, (1,), (0,)),
    }
    dist_checkpointing.save(
        state, tmp_path, TorchDistSaveShardedStrategy("torch_dist", 1, separation_hint="optimizer.")
    )
    assert any(path.name.startswith("optimizer.__0_") for path in tmp_path.iterdir())
    dist_checkpointing.remove_sharded_tensors(tmp_path, "optimizer.")
    assert set(load_sharded_metadata(tmp_path)) == {"model.b"}
    assert not any(path.name.startswith("optimizer.") for path in tmp_path.iterdir())
    assert torch.equal(dist_checkpointing.load_plain_tensors(tmp_path)["model.b"], torch.arange(4.0))


def save_different_common(directory: str) -> str:
    import io

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("megatron.core.dist_checkpointing.validation").addHandler(handler)
    dist_checkpointing.save({"lr": 0.1 + dist.get_rank(), "same": 1}, directory)
    return stream.getvalue()


def test_common_state_that_differs_between_ranks_is_reported(tmp_path: Path) -> None:
    texts = run_ranks(2, save_different_common, str(tmp_path))
    assert "common state of rank 1 differs from what rank 0 saves: /lr" in texts[0]
    assert dist_checkpointing.load_common_state_dict(tmp_path)["lr"] == 0.1
