"""Names of parameters here and in sharded checkpoints, there and back; experts of rank files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export.loading import catalog_of_state
from megatron.core.export.rank_files import RankFilesState, RankSizes, write_rank_files
from megatron.core.export.sharded_files import write_sharded_files
from megatron.core.export.sharded_state import ShardedState
from megatron.core.export.weights import ModelShape
from megatron.core.export.whole_state import DictState, Naming, Stacked, name_at, stacked_axes

EXPERTS, LAYERS = 4, 4


def mixture(with_experts: set[int]) -> dict[str, torch.Tensor]:
    """Parameters of a model in which these layers have experts, all different."""
    names: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (8, 4)}
    for n in range(LAYERS):
        here = f"decoder.layers.{n}."
        names |= {f"{here}input_layernorm.weight": (4,), f"{here}pre_mlp_layernorm.weight": (4,)}
        names[f"{here}self_attention.linear_proj.weight"] = (4, 4)
        if n in with_experts:
            names[f"{here}mlp.router.weight"] = (EXPERTS, 4)
            for e in range(EXPERTS):
                names[f"{here}mlp.experts.local_experts.{e}.linear_fc1.weight"] = (12, 4)
                names[f"{here}mlp.experts.local_experts.{e}.linear_fc2.weight"] = (4, 6)
        else:
            names |= {f"{here}mlp.linear_fc1.weight": (12, 4), f"{here}mlp.linear_fc2.weight": (4, 6)}
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(names.items())}


def test_places() -> None:
    same, mixed = Naming.of(mixture({0, 1, 2, 3})), Naming.of(mixture({0, 2}))
    expert = "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"
    assert same.place(expert) == Stacked("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 3))
    assert mixed.place(expert) == Stacked("decoder.layers.2.mlp.experts.experts.linear_fc1.weight", (3,))
    norm = "decoder.layers.{}.pre_mlp_layernorm.weight".format
    assert same.place(norm(1)) == Stacked("decoder.layers.pre_mlp_layernorm.weight", (1,))
    assert mixed.place(norm(2)) == Stacked(norm(2), ())
    assert mixed.place(norm(1)) == Stacked("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", ())


@pytest.mark.parametrize("with_experts", [set(), {0, 2}, {0, 1, 2, 3}])
def test_names_return(with_experts: set[int]) -> None:
    tensors = mixture(with_experts)
    naming, catalog = Naming.of(tensors), catalog_of_state(DictState(tensors))
    for name in tensors:
        key, place = naming.place(name)
        assert len(place) == stacked_axes(key)
        assert name_at(key, place) == name
        assert catalog.tensors[key].shape[len(place) :] == tensors[name].shape


@pytest.mark.parametrize("kind", ["torch_dist", "safetensors"])
@pytest.mark.parametrize("with_experts", [{0, 2}, {0, 1, 2, 3}])
def test_sharded_files_return_every_expert(with_experts: set[int], kind: str, tmp_path: Path) -> None:
    tensors = mixture(with_experts)
    write_sharded_files(tmp_path, DictState(tensors), {"iteration": 1}, kind)
    found = ShardedState(tmp_path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def write_ranks(directory: Path, sizes: RankSizes, **more: int) -> dict[str, torch.Tensor]:
    import argparse

    tensors = mixture({0, 1, 2, 3})
    heads = {"num_layers": LAYERS, "num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 2}
    shape = ModelShape(**heads, gated=True, num_experts=EXPERTS)
    settings = {"swiglu": True, "tensor_model_parallel_size": sizes.tensor, "num_attention_heads": 2}
    args = argparse.Namespace(**settings, expert_model_parallel_size=sizes.expert, **more)
    write_rank_files(directory, DictState(tensors), shape, sizes, {"args": args, "checkpoint_version": 3.0})
    return tensors


@pytest.mark.parametrize("sizes", [RankSizes(1, 1, 4), RankSizes(2, 1, 2), RankSizes(2, 2, 2), RankSizes(1, 2, 1)])
def test_rank_files_return_every_expert(sizes: RankSizes, tmp_path: Path) -> None:
    tensors = write_ranks(tmp_path, sizes)
    assert (
        len(json.loads((tmp_path / "manifest.json").read_text())["files"])
        == sizes.tensor * sizes.pipeline * sizes.expert
    )
    found = RankFilesState(tmp_path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_experts_that_are_cut_otherwise_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path, RankSizes(2, 1, 2), expert_tensor_parallel_size=1)
    with pytest.raises(CheckpointingException, match="cut over 1 and other weights over 2 tensor parallel ranks"):
        RankFilesState(tmp_path)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    write_ranks(tmp_path, RankSizes(2, 1, 2))
    (tmp_path / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointingException, match=r"\(0, 0, 1\) missing"):
        RankFilesState(tmp_path)
