"""Mamba-2 (arXiv:2405.21060): state space layers alone; both sides name and shape what they have alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..family import Family, require
from ..weights import ModelShape, Weight, same

OF_MIXER = (
    "dt_bias",
    "A_log",
    "D",
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "norm.weight",
    "out_proj.weight",
)


def weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of `Mamba2ForCausalLM`."""
    yield same("embedding.word_embeddings.weight", "backbone.embeddings.weight")
    for n in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"backbone.layers.{n}."
        yield same(f"{ours}norm.weight", f"{theirs}norm.weight")
        for name in OF_MIXER:
            yield same(f"{ours}mixer.{name}", f"{theirs}mixer.{name}")
    yield same("decoder.final_norm.weight", "backbone.norm_f.weight")
    if not shape.tied:
        yield same("output_layer.weight", "lm_head.weight")


def _number(value: Any) -> float:
    """config.json spells infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, Mapping) else float(value)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    limit = [_number(value) for value in config.get("time_step_limit") or (0.0, math.inf)]
    require(limit == [0.0, math.inf], f"time_step_limit is {limit}, only none can be computed")
    return {
        "num_attention_heads": config["num_heads"],  # of no layer, but sizes are incomplete without
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def _write(settings: Mapping[str, Any]) -> dict[str, Any]:
    pattern = settings.get("hybrid_override_pattern") or ""
    require(set(pattern) <= {"M"}, f"the layers are {pattern}")
    hidden, heads = settings["hidden_size"], settings.get("mamba_num_heads")
    inner = 2 * hidden if heads is None else heads * settings["mamba_head_dim"]
    require(inner % hidden == 0, f"{inner} channels of a mixer are no multiple of hidden_size {hidden}")
    return {
        "num_heads": inner // settings["mamba_head_dim"],
        "expand": inner // hidden,
        "tie_word_embeddings": not settings.get("untie_embeddings_and_output_weights"),
    }


MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    our_type="mamba",
    weights=weights,
    root="backbone.",
    fixed={
        "normalization": "RMSNorm",
        "apply_layernorm_1p": False,
        "norm_epsilon": 1e-5,  # that of the mixer's norm
        "position_embedding_type": "none",
        "hybrid_attention_ratio": 0.0,
        "hybrid_mlp_ratio": 0.0,
        "num_experts": None,
    },
    renamed={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "mamba_state_dim": "state_size",
        "mamba_head_dim": "head_dim",
        "mamba_num_groups": "n_groups",
        "mamba_num_heads": "num_heads",
    },
    expected={
        "layer_norm_epsilon": (1e-5,),
        "hidden_act": ("silu", "swish"),
        "conv_kernel": (4,),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "residual_in_fp32": (False, True),  # the same in fp32
    },
    read=_read,
    write=_write,
)
