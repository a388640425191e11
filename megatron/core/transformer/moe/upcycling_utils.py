"""Experts made of a dense feed-forward block, so that the mixture computes the same at first (arXiv:2212.05055;
narrower experts: arXiv:2410.07524, section 3.2).

A block is cut into G shards of f/G features, whose results sum to its own; each shard has E/G copies. Expert c G + g is
shard g of copy c, and routers give all shards of a copy the same score: a token goes to k/G whole copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_pg_size, unwrap_model


def upcycle_state_dict(moe_model: Sequence[nn.Module], dense_model: Sequence[nn.Module]) -> dict[str, dict[str, Any]]:
    """State of the model with experts, filled with the weights of the dense one: `{"model": state}`, or
    `{"model0": state, "model1": ...}` for several model chunks. Nothing is communicated or changed.

    Each expert of this rank is its dense block, or a part of it where experts are narrower. Routers and expert biases
    are those that `moe_model` has; of narrower experts, those of a copy get the row of its first one.

    Args:
        moe_model, dense_model: this rank's chunks, of the same tensor and pipeline parallel layout.

    Raises:
        ValueError: the models do not fit: other layers or widths, something of a mixture that no dense block has
            (shared experts), or shards of experts that differ between layouts.
    """
    if len(moe_model) != len(dense_model):
        raise ValueError(f"{len(moe_model)} chunks with experts, {len(dense_model)} dense ones: give as many of both")
    states = [_state_of_chunk(unwrap_model(moe), unwrap_model(dense)) for moe, dense in zip(moe_model, dense_model)]
    return {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}


def _state_of_chunk(moe: nn.Module, dense: nn.Module) -> dict[str, Any]:
    mixtures = {f"{name}.": layer for name, layer in moe.named_modules() if isinstance(layer, MoELayer)}
    weights = dense.state_dict()
    state: dict[str, Any] = {}
    for name, own in moe.state_dict().items():
        prefix = next((prefix for prefix in mixtures if name.startswith(prefix)), None)
        if prefix is not None and own is not None:
            state[name] = _of_mixture(mixtures[prefix], prefix, name.removeprefix(prefix), own, weights)
        else:
            state[name] = weights.get(name, own) if own is None else weights.get(name)
        found = state[name]
        if own is not None and (found is None or found.shape != own.shape):
            says = "does not have it" if found is None else f"has {tuple(found.shape)}"
            raise ValueError(f"{name} is {tuple(own.shape)} in the model with experts; the dense model {says}")
    return state


def _of_mixture(layer: MoELayer, prefix: str, rest: str, own: Tensor, weights: dict[str, Any]) -> Tensor:
    """A tensor of a mixture, from the matrices of the dense block in its place."""
    matrices = [weights.get(f"{prefix}linear_fc{i}.weight") for i in (1, 2)]
    if matrices[0] is None or matrices[1] is None:
        raise ValueError(f"the dense model has no feed-forward block in {prefix.removesuffix('.')}")
    granularity = _granularity(layer, prefix, matrices[1])
    if rest.startswith("router."):
        return own[::granularity].repeat_interleave(granularity, dim=0)
    config = layer.config
    assert config.num_moe_experts is not None
    scale = output_scale(config, config.num_moe_experts, granularity)
    first, count = layer.local_expert_indices[0], layer.num_local_experts

    def expert(matrix: int, number: int) -> Tensor:
        dense = matrices[matrix - 1]
        assert dense is not None
        return matrix_of_expert(dense, matrix, number % granularity, granularity, config.gated_linear_unit, scale)

    if isinstance(layer.experts, GroupedMLP) and rest in ("experts.weight1", "experts.weight2"):
        return torch.stack([expert(int(rest[-1]), first + i) for i in range(count)])
    words = rest.split(".")
    if words[:2] == ["experts", "local_experts"] and words[3:] in (["linear_fc1", "weight"], ["linear_fc2", "weight"]):
        return expert(int(words[3][-1]), first + int(words[2]))
    raise ValueError(f"{prefix}{rest}: no dense block has anything of the kind")


def _granularity(layer: MoELayer, prefix: str, second: Tensor) -> int:
    """How many experts a copy of the dense block has, whose second matrix [h, f/tp] is given."""
    width, tp = layer.config.moe_ffn_hidden_size, layer.attn_tp_size
    assert width is not None
    dense_width = second.size(1) * tp
    granularity, left = divmod(dense_width, width)
    if left or not granularity:
        raise ValueError(f"{prefix}experts are {width} wide, which is no part of the dense block's {dense_width}")
    if get_pg_size(layer.experts.tp_group) != tp:
        raise ValueError("experts are not cut as the dense block is: make both tensor parallel sizes the same")
    if granularity > 1 and tp > 1:
        raise ValueError(
            f"experts of 1/{granularity} of the dense block under tensor parallelism would differ from layout to "
            "layout: make them with one tensor parallel rank, or with --moe-use-upcycling"
        )
    return granularity


def matrix_of_expert(dense: Tensor, matrix: int, shard: int, granularity: int, gated: bool, scale: float) -> Tensor:
    """The first [f/G, h] (gated: [2f/G, h]) or second [h, f/G] matrix of shard `shard` of a dense block's one; the
    second times `scale`."""
    if matrix == 2:
        return (dense.chunk(granularity, dim=1)[shard] * scale).to(dense.dtype)
    halves = dense.chunk(2) if gated else (dense,)
    return torch.cat([half.chunk(granularity)[shard] for half in halves])


def output_scale(settings: Any, num_experts: int, granularity: int) -> float:
    """What makes the weights of a copy's shards sum to 1; `settings` are those of routers, a configuration's or flags.

    Weights of a token's k experts sum to the scaling factor; of a softmax over all E experts of even scores, to k/E.
    """
    over_all = settings.moe_router_score_function == "softmax" and (
        settings.moe_router_pre_softmax or settings.moe_router_load_balancing_type == "sinkhorn"
    )
    total = settings.moe_router_topk / num_experts if over_all else 1.0
    return granularity / (total * (settings.moe_router_topk_scaling_factor or 1.0))
