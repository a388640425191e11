"""Mixtral and Qwen3-MoE: Mistral and Qwen3 with a mixture of experts in each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..family import Family, require
from ..weights import ModelShape, Weight, same, stacked
from .llama import read_mistral, read_qwen3, relative, weights, write_mistral, write_qwen3

ROUTING: Mapping[str, Any] = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
}
"""Every layer has experts; each token goes to the k of the largest logits, and none is dropped."""


def experts(names: tuple[str, str, str, str], shape: ModelShape, ours: str, theirs: str) -> Iterator[Weight]:
    """Rows of a layer's mixture; `names` are theirs of the block and of an expert's gate, up and down projection."""
    block, gate, up, down = names
    yield same(f"{ours}mlp.router.weight", f"{theirs}{block}.gate.weight")
    for number in range(shape.num_experts or 0):
        here, there = f"{ours}mlp.experts.local_experts.{number}.", f"{theirs}{block}.experts.{number}."
        yield stacked(f"{here}linear_fc1.weight", f"{there}{gate}.weight", f"{there}{up}.weight")
        yield same(f"{here}linear_fc2.weight", f"{there}{down}.weight")


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
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_pre_softmax": False,
    }


def _write_mixtral(settings: Mapping[str, Any]) -> dict[str, Any]:
    number = require_routing(settings)
    chosen_first = not settings.get("moe_router_pre_softmax")
    require(chosen_first, "moe_router_pre_softmax is set")
    width = settings.get("moe_ffn_hidden_size") or settings.get("ffn_hidden_size")
    return {**write_mistral(settings), "num_local_experts": number, "intermediate_size": width}


# --- Qwen3 ----------------------------------------------------------------------------------------------


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    number = config.get("num_experts") or config.get("num_local_experts")
    require(number, "num_experts is missing")
    return {
        **read_qwen3(config),
        "num_experts": number,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config.get("norm_topk_prob"),
    }


def _write_qwen3_moe(settings: Mapping[str, Any]) -> dict[str, Any]:
    number = require_routing(settings)
    width = settings.get("moe_ffn_hidden_size") or settings.get("ffn_hidden_size")
    return {
        **{key: value for key, value in write_qwen3(settings).items() if key != "layer_types"},
        "num_experts": number,
        "moe_intermediate_size": width,
        "norm_topk_prob": not settings.get("moe_router_pre_softmax"),
    }


def _mixture(
    model_type: str,
    architecture: str,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    write: Callable[[Mapping[str, Any]], dict[str, Any]],
    names: tuple[str, str, str, str],
    **expected: tuple[Any, ...],
) -> Family:
    family = relative(model_type, architecture, read, write, **expected)
    fixed = {**{key: value for key, value in family.fixed.items() if key != "num_experts"}, **ROUTING}
    return replace(
        family,
        weights=partial(weights, feed_forward=partial(experts, names)),
        fixed=fixed,
        renamed={**family.renamed, "moe_router_topk": "num_experts_per_tok"},
        hints={**family.hints, "moe_aux_loss_coeff": "router_aux_loss_coef"},
    )


MIXTRAL = _mixture(
    "mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, ("block_sparse_moe", "w1", "w3", "w2")
)
QWEN3_MOE = _mixture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    ("mlp", "gate_proj", "up_proj", "down_proj"),
    attention_bias=(False,),
    decoder_sparse_step=(1,),
    mlp_only_layers=([],),
)
