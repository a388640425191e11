"""A tiny model's state as any layout has it, made from known global tensors without any model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

LAYERS, HIDDEN, FFN, VOCAB = 4, 6, 16, 12

GLOBAL_SHAPES = {
    "emb": (VOCAB, HIDDEN),
    "qkv": (LAYERS, 24, HIDDEN),
    "proj": (LAYERS, HIDDEN, 8),
    "norm": (LAYERS, HIDDEN),
    "fc1": (LAYERS, 2 * FFN, HIDDEN),
    "scale": (),
}


@dataclass(frozen=True)
class Layout:
    """Sizes; ranks are numbered tensor, data, pipeline, the first fastest."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    flat: bool = False
    """Optimizer state flattened and cut over data parallel ranks."""
    padded_vocab: int = VOCAB

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp * self.pp

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, pipeline) rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)


def global_tensor(key: str, prefix: str = "") -> torch.Tensor:
    """The whole tensor; every element of every tensor is another number."""
    shape = GLOBAL_SHAPES[key]
    start = 10_000 * (1 + list(GLOBAL_SHAPES).index(key)) + (100_000 if prefix else 0)
    return start + torch.arange(prod(shape), dtype=torch.float32).reshape(shape)


def padded_embedding(layout: Layout, prefix: str = "") -> torch.Tensor:
    """The embedding with rows of zeros, or without its last rows, as the layout's padding demands."""
    rows = layout.padded_vocab
    whole = torch.zeros(rows, HIDDEN)
    whole[: min(rows, VOCAB)] = global_tensor("emb", prefix)[:rows]
    return whole


def local_shards(layout: Layout, rank: int, prefix: str = "") -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """All parameters of a rank, with the right values."""
    t, d, p = layout.place(rank)
    shards: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    per_stage = LAYERS // layout.pp
    for layer in range(p * per_stage, (p + 1) * per_stage):
        stack = (0, layer, LAYERS)
        options = {"prepend_axis_num": 1}
        cut = {"replica_id": (0, 0, d), **options}
        whole = {"replica_id": (0, t, d), **options}
        qkv = global_tensor("qkv", prefix)[layer].chunk(layout.tp, 0)[t].contiguous()
        proj = global_tensor("proj", prefix)[layer].chunk(layout.tp, 1)[t].contiguous()
        gate, up = global_tensor("fc1", prefix)[layer].chunk(2, 0)
        fc1 = torch.cat([gate.chunk(layout.tp, 0)[t], up.chunk(layout.tp, 0)[t]])
        name = f"layers.{layer - p * per_stage}"
        shards[f"{name}.qkv"] = ShardedTensor.from_rank_offsets("qkv", qkv, stack, (1, t, layout.tp), **cut)
        shards[f"{name}.proj"] = ShardedTensor.from_rank_offsets("proj", proj, stack, (2, t, layout.tp), **cut)
        norm = global_tensor("norm", prefix)[layer].clone()
        shards[f"{name}.norm"] = ShardedTensor.from_rank_offsets("norm", norm, stack, **whole)
        shard = ShardedTensor.from_rank_offsets("fc1", fc1, stack, (1, t, layout.tp), **cut)
        shards[f"{name}.fc1"] = apply_swiglu_sharded_factory(shard, (stack,))
    if p in (0, layout.pp - 1):  # the last stage has a tied copy
        rows = padded_embedding(layout, prefix).chunk(layout.tp, 0)[t].clone()
        shards["emb"] = ShardedTensor.from_rank_offsets(
            "emb", rows, (0, t, layout.tp), replica_id=(min(p, 1), 0, d), allow_shape_mismatch=True
        )
    shards["scale"] = ShardedTensor.from_rank_offsets(
        "scale", global_tensor("scale", prefix).clone(), replica_id=(p, t, d)
    )
    return shards


def local_optimizer(layout: Layout, rank: int) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Optimizer state `exp_avg` of a rank's parameters: whole boxes, or its range of the flattened ones."""
    _, d, _ = layout.place(rank)
    state = {}
    for name, shard in local_shards(layout, rank, "exp_avg.").items():
        shard = replace(shard, key=f"exp_avg.{shard.key}")
        if layout.flat:
            flat = shard.data.reshape(-1)
            start, stop = (flat.numel() * i // layout.dp for i in (d, d + 1))
            if start == stop:
                continue
            shard = replace(
                shard,
                data=flat[start:stop].clone(),
                flattened_range=slice(start, stop),
                replica_id=(*shard.replica_id[:2], 0),
            )
        state[name] = shard
    return state


def local_state(layout: Layout, rank: int) -> dict:
    """Everything that a rank saves."""
    t, d, p = layout.place(rank)
    return {
        "model": local_shards(layout, rank),
        "optimizer": {"state": local_optimizer(layout, rank), "lr": 0.25},
        "rng": ShardedObject("rng", {"place": (p, t)}, (layout.pp, layout.tp), (p, t), replica_id=d),
        "iteration": 7,
    }


def blank(state: dict) -> dict:
    """The same request with NaN in every tensor."""
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, (ShardedTensor, ShardedTensorFactory)):
        return replace(state, data=torch.full_like(state.data, torch.nan))
    if isinstance(state, ShardedObject):
        return state.without_data()
    return state


def assert_loaded(loaded: dict, expected: dict, path: str = "") -> None:
    """Every tensor of `expected`, bitwise."""
    for key, value in expected.items():
        where = f"{path}/{key}"
        if isinstance(value, dict):
            assert_loaded(loaded[key], value, where)
        elif isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            assert loaded[key].shape == value.data.shape, where
            assert torch.equal(loaded[key], value.data), f"{where}: {loaded[key]} != {value.data}"
        elif isinstance(value, ShardedObject):
            assert loaded[key] == value.data, where
        else:
            assert loaded[key] == value, where
