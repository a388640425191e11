"""DeepSeek-V2 and -V3: latent attention, dense layers first, then experts of which some see every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ..family import Family, require
from ..weights import ModelShape, Weight, pattern_of_layers, same
from .llama import HINTS, gated, weights
from .mixtral import QWEN_NAMES, experts, require_routing
from .rope import plain_number

LATENTS = {
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}
QUERIES = {"linear_q_proj": "q_proj"}
LATENT_QUERIES = {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm", "linear_q_up_proj": "q_b_proj"}
"""Our names of attention's parameters -> theirs."""


def latent_attention(shape: ModelShape, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """Rows of a layer's attention."""
    for here, there in {**(LATENT_QUERIES if shape.q_lora_rank else QUERIES), **LATENTS}.items():
        yield same(f"{ours}self_attention.{here}.weight", f"{theirs}self_attn.{there}.weight")


def experts_and_shared(shape: ModelShape, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """Rows of a layer's dense block, or of its experts with those that see every token."""
    yield from experts(QWEN_NAMES, shape, number, ours, theirs)
    if shape.has_experts(number):
        yield from gated(shape, f"{ours}mlp.shared_experts.", f"{theirs}mlp.shared_experts.")
        if shape.moe_router_enable_expert_bias:
            yield same(f"{ours}mlp.router.expert_bias", f"{theirs}mlp.gate.e_score_correction_bias")


# --- settings that both have ----------------------------------------------------------------------------


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    groups = config.get("num_key_value_heads") or heads
    require(groups == heads, f"num_key_value_heads is {groups}, num_attention_heads {heads}")
    dense, shared = config.get("first_k_dense_replace") or 0, config.get("n_shared_experts")
    require(shared, "n_shared_experts is not set")
    scaling = float(config.get("routed_scaling_factor") or 1.0)
    return {
        **_read_positions(config),
        "q_lora_rank": config.get("q_lora_rank"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
        "moe_shared_expert_intermediate_size": shared * config["moe_intermediate_size"],
        "moe_router_topk_scaling_factor": None if scaling == 1.0 else scaling,
    }


def _write(settings: Mapping[str, Any]) -> dict[str, Any]:
    number, layers = require_routing(settings), settings["num_layers"]
    pattern = pattern_of_layers(settings.get("moe_layer_freq"), layers)
    dense = pattern.index(True) if any(pattern) else layers
    require(all(pattern[dense:]), f"moe_layer_freq is {settings.get('moe_layer_freq')}: only first layers are dense")
    width = settings.get("moe_ffn_hidden_size") or settings["ffn_hidden_size"]
    shared = settings.get("moe_shared_expert_intermediate_size") or 0
    require(
        shared and shared % width == 0,
        f"moe_shared_expert_intermediate_size is {shared}, no multiple of an expert's {width}",
    )
    return {
        **_write_positions(settings),
        "q_lora_rank": settings.get("q_lora_rank"),
        "num_key_value_heads": settings["num_attention_heads"],
        "tie_word_embeddings": not settings.get("untie_embeddings_and_output_weights"),
        "first_k_dense_replace": dense,
        "n_routed_experts": number,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "routed_scaling_factor": settings.get("moe_router_topk_scaling_factor") or 1.0,
        "num_nextn_predict_layers": 0,
    }


def _read_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their temperature on scores and on cos and sin has two strengths; ours are equal to one of them."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    require(kind in ("default", "yarn"), f"rope_type {kind!r} is not built for latent attention")
    theta = plain_number(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    plain = {"rotary_base": theta, "rotary_scaling_factor": 1.0}
    if kind == "default":
        return plain
    strengths = [float(scaling.get(key) or 0.0) for key in ("mscale", "mscale_all_dim")]
    require(strengths[0] == strengths[1], "yarn with mscale {} and mscale_all_dim {}".format(*strengths))
    turns = [float(scaling.get(key) or usual) for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))]
    require(turns == [32.0, 1.0], "yarn with beta_fast {} and beta_slow {} is not built".format(*turns))
    return {
        **plain,
        "rotary_scaling_factor": float(scaling["factor"]),
        "max_position_embeddings": scaling["original_max_position_embeddings"],
        "mscale": strengths[0],
        "mscale_all_dim": strengths[1],
    }


def _write_positions(settings: Mapping[str, Any]) -> dict[str, Any]:
    theta, factor = float(settings.get("rotary_base", 10000)), settings.get("rotary_scaling_factor") or 1.0
    if factor == 1.0:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}
    strengths = [settings.get(name, 1.0) for name in ("mscale", "mscale_all_dim")]
    require(strengths[0] == strengths[1], "mscale is {} and mscale_all_dim {}".format(*strengths))
    original = settings["max_position_embeddings"]
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "mscale": strengths[0],
        "mscale_all_dim": strengths[1],
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    return {
        "rope_parameters": {**scaling, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": int(original * factor),
    }


# --- the two ways to choose experts ---------------------------------------------------------------------


def _groups(config: Mapping[str, Any], best_of_group: int) -> dict[str, Any]:
    """A group is as good as the sum of its best experts' scores: of as many as a token takes from each group here."""
    groups, kept, k = config.get("n_group"), config.get("topk_group"), config["num_experts_per_tok"]
    if not groups or groups == 1:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    require(
        k // kept == best_of_group,
        f"groups are as good as their {best_of_group} best here only if num_experts_per_tok ({k}) // topk_group "
        f"({kept}) is {best_of_group}",
    )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": kept}


def _write_groups(settings: Mapping[str, Any], best_of_group: int) -> dict[str, Any]:
    kept, k = settings.get("moe_router_group_topk"), settings["moe_router_topk"]
    if not kept:
        return {"n_group": 1, "topk_group": 1}
    require(k // kept == best_of_group, f"moe_router_topk ({k}) // moe_router_group_topk ({kept})")
    return {"n_group": settings["moe_router_num_groups"], "topk_group": kept}


def _read_v2(config: Mapping[str, Any]) -> dict[str, Any]:
    limited = config.get("topk_method", "greedy") != "greedy"
    return {**_read(config), **_groups(config if limited else {"num_experts_per_tok": 1}, 1)}


def _write_v2(settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = _write_groups(settings, 1)
    method = "greedy" if groups["n_group"] == 1 else "group_limited_greedy"
    return {**_write(settings), **groups, "topk_method": method}


def _read_v3(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config["num_experts_per_tok"] > 1, "a weight of one expert is not normalised here")
    return {**_read(config), **_groups(config, 2)}


def _write_v3(settings: Mapping[str, Any]) -> dict[str, Any]:
    require(settings["moe_router_topk"] > 1, "moe_router_topk is 1: its weight is not normalised here")
    return {**_write(settings), **_write_groups(settings, 2)}


def _deepseek(
    version: int,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    write: Callable[[Mapping[str, Any]], dict[str, Any]],
    fixed: Mapping[str, Any],
    **expected: tuple[Any, ...],
) -> Family:
    return Family(
        model_type=f"deepseek_v{version}",
        architecture=f"DeepseekV{version}ForCausalLM",
        our_type="gpt",
        weights=partial(weights, feed_forward=experts_and_shared, attention=latent_attention),
        root="model.",
        fixed={
            "multi_latent_attention": True,
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "qk_layernorm": True,
            "qk_l2_norm": False,
            "group_query_attention": False,
            "window_size": None,
            "softmax_scale": None,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-6,  # the latents' norms have it, whatever config.json says
            "apply_layernorm_1p": False,
            "apply_residual_connection_post_layernorm": False,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "swiglu": True,
            "geglu": False,
            "squared_relu": False,
            "mtp_num_layers": None,
            "moe_shared_expert_gate": False,
            "moe_expert_capacity_factor": None,
            "moe_apply_probs_on_input": False,
            **fixed,
        },
        renamed={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_attention_heads": "num_attention_heads",
            "kv_lora_rank": "kv_lora_rank",
            "qk_head_dim": "qk_nope_head_dim",
            "qk_pos_emb_head_dim": "qk_rope_head_dim",
            "v_head_dim": "v_head_dim",
            "num_experts": "n_routed_experts",
            "moe_ffn_hidden_size": "moe_intermediate_size",
            "moe_router_topk": "num_experts_per_tok",
        },
        expected={
            "hidden_act": ("silu", "swish"),
            "rms_norm_eps": (1e-6,),
            "attention_bias": (False,),
            "moe_layer_freq": (1,),
            **expected,
        },
        read=read,
        write=write,
        hints=HINTS,
    )


DEEPSEEK_V2 = _deepseek(
    2,
    _read_v2,
    _write_v2,
    {
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": False,
    },
    mlp_bias=(False,),
    norm_topk_prob=(False,),
    scoring_func=("softmax",),
)
DEEPSEEK_V3 = _deepseek(
    3,
    _read_v3,
    _write_v3,
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    norm_topk_prob=(True,),
    scoring_func=("sigmoid",),
    topk_method=("noaux_tc",),
    rope_interleave=(True,),
)
