"""Mixtral, Qwen2-MoE and Qwen3-MoE: Mistral, Qwen2 and Qwen3 with mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..family import Family, require
from ..weights import ModelShape, Weight, pattern_of_layers, same, stacked
from .llama import (
    Block,
    dense,
    gated,
    read_mistral,
    read_qwen2,
    read_qwen3,
    relative,
    weights,
    write_mistral,
    write_qwen2,
    write_qwen3,
)

ROUTING: Mapping[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
}
"""Each token goes to the k experts of the largest logits, and none is dropped."""
ALONE: Mapping[str, Any] = {"moe_shared_expert_intermediate_size": None}
"""No expert sees all tokens."""
QWEN_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")


def experts(
    names: tuple[str, str, str, str], shape: ModelShape, number: int, ours: str, theirs: str
) -> Iterator[Weight]:
    """Rows of a layer's mixture, or of its dense block; `names` are theirs of the block and of an expert's gate, up and
    down projection."""
    if not shape.has_experts(number):
        yield from dense(shape, number, ours, theirs)
        return
    block, gate, up, down = names
    yield same(f"{ours}mlp.router.weight", f"{theirs}{block}.gate.weight")
    for number in range(shape.num_experts or 0):
        here, there = f"{ours}mlp.experts.local_experts.{number}.", f"{theirs}{block}.experts.{number}."
        yield stacked(f"{here}linear_fc1.weight", f"{there}{gate}.weight", f"{there}{up}.weight")
        yield same(f"{here}linear_fc2.weight", f"{there}{down}.weight")


def with_gated_shared_expert(shape: ModelShape, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """The same, and an expert that sees all tokens, with a gate."""
    yield from experts(QWEN_NAMES, shape, number, ours, theirs)
    if shape.has_experts(number):
        yield from gated(shape, f"{ours}mlp.shared_experts.", f"{theirs}mlp.shared_expert.")
        yield same(f"{ours}mlp.shared_experts.gate_weight", f"{theirs}mlp.shared_expert_gate.weight")


def require_routing(settings: Mapping[str, Any]) -> int:
    """The number of experts; raises `NotExpressible` if there are none, or assigned so as to be balanced."""
    require(settings.get("num_experts"), "num_experts is not set")
    balancing = settings.get("moe_router_load_balancing_type")
    require(balancing != "sinkhorn", "moe_router_load_balancing_type is 'sinkhorn'")
    return int(settings["num_experts"])


# --- Mixtral --------------------------------------------------------------------------------------------


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **read_mistral(config),
        "num_experts": config["num_local_experts"],
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_pre_softmax": False,
    }


def _write_mixtral(settings: Mapping[str, Any]) -> dict[str, Any]:
    number = require_routing(settings)
    chosen_first = not settings.get("moe_router_pre_softmax")
    require(chosen_first, "moe_router_pre_softmax is set")
    pattern = pattern_of_layers(settings.get("moe_layer_freq"), settings["num_layers"])
    require(all(pattern), f"moe_layer_freq is {settings.get('moe_layer_freq')}")
    width = settings.get("moe_ffn_hidden_size") or settings.get("ffn_hidden_size")
    return {**write_mistral(settings), "num_local_experts": number, "intermediate_size": width}


# --- Qwen -----------------------------------------------------------------------------------------------


def _read_qwen_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    number, layers = config.get("num_experts") or config.get("num_local_experts"), config["num_hidden_layers"]
    require(number, "num_experts is missing")
    step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    pattern = [int(layer not in plain and (layer + 1) % step == 0) for layer in range(layers)]
    return {
        "num_experts": number,
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config.get("norm_topk_prob"),
    }


def _write_qwen_experts(settings: Mapping[str, Any]) -> dict[str, Any]:
    pattern = pattern_of_layers(settings.get("moe_layer_freq"), settings["num_layers"])
    return {
        "num_experts": require_routing(settings),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, mixed in enumerate(pattern) if not mixed],
        "moe_intermediate_size": settings.get("moe_ffn_hidden_size") or settings.get("ffn_hidden_size"),
        "norm_topk_prob": not settings.get("moe_router_pre_softmax"),
    }


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**read_qwen3(config), **_read_qwen_experts(config)}


def _write_qwen3_moe(settings: Mapping[str, Any]) -> dict[str, Any]:
    attention = {key: value for key, value in write_qwen3(settings).items() if key != "layer_types"}
    return {**attention, **_write_qwen_experts(settings)}


def _read_qwen2_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    shared = {"moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"]}
    return {**read_qwen2(config), **_read_qwen_experts(config), **shared}


def _write_qwen2_moe(settings: Mapping[str, Any]) -> dict[str, Any]:
    width = settings.get("moe_shared_expert_intermediate_size")
    require(width, "moe_shared_expert_intermediate_size is not set")
    experts_and_more = {**_write_qwen_experts(settings), "shared_expert_intermediate_size": width}
    return {**write_qwen2(settings), **experts_and_more}


def _mixture(
    model_type: str,
    architecture: str,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    write: Callable[[Mapping[str, Any]], dict[str, Any]],
    block: Block,
    more_fixed: Mapping[str, Any] = ALONE,
    **expected: tuple[Any, ...],
) -> Family:
    family = relative(model_type, architecture, read, write, **expected)
    fixed = {**{key: value for key, value in family.fixed.items() if key != "num_experts"}, **ROUTING, **more_fixed}
    return replace(
        family,
        weights=partial(weights, feed_forward=block),
        fixed=fixed,
        renamed={**family.renamed, "moe_router_topk": "num_experts_per_tok"},
        hints={**family.hints, "moe_aux_loss_coeff": "router_aux_loss_coef"},
    )


MIXTRAL = _mixture(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    partial(experts, ("block_sparse_moe", "w1", "w3", "w2")),
)
QWEN2_MOE = _mixture(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read_qwen2_moe,
    _write_qwen2_moe,
    with_gated_shared_expert,
    {"moe_shared_expert_gate": True},
    qkv_bias=(True,),
)
QWEN3_MOE = _mixture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    partial(experts, QWEN_NAMES),
    attention_bias=(False,),
)
