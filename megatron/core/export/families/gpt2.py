"""GPT-2: tied embeddings, learned positions, tanh GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..family import Family
from ..weights import KINDS, HeadShape, ModelShape, Weight, interleave_qkv, same, separate_qkv, transposed
from .learned_positions import FIXED, read_heads, require_heads


def weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of `GPT2LMHeadModel`."""
    yield same("embedding.word_embeddings.weight", "transformer.wte.weight")
    yield same("embedding.position_embeddings.weight", "transformer.wpe.weight")
    for n in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"transformer.h.{n}."
        for kind in KINDS:
            yield same(f"{ours}input_layernorm.{kind}", f"{theirs}ln_1.{kind}")
            yield same(f"{ours}pre_mlp_layernorm.{kind}", f"{theirs}ln_2.{kind}")
            yield _qkv(shape, f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.c_attn.{kind}")
        for our_name, their_name in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            yield transposed(f"{ours}{our_name}.weight", f"{theirs}{their_name}.weight")
            yield same(f"{ours}{our_name}.bias", f"{theirs}{their_name}.bias")
    for kind in KINDS:
        yield same(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}")


def _qkv(shape: HeadShape, ours: str, theirs: str) -> Weight:
    """GPT-2 stores [q ; k ; v] side by side, its matrices transposed."""

    def pack(parts: list[Tensor]) -> Tensor:
        rows = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return interleave_qkv(list(rows.chunk(3)), shape)

    def unpack(whole: Tensor) -> list[Tensor]:
        rows = torch.cat(separate_qkv(whole, shape))
        return [rows.t().contiguous() if rows.dim() == 2 else rows]

    return Weight(ours, (theirs,), pack, unpack)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["n_embd"]
    return {"ffn_hidden_size": config.get("n_inner") or 4 * width, **read_heads(width, config["n_head"])}


def _write(settings: Mapping[str, Any]) -> dict[str, Any]:
    require_heads(settings)
    return {"n_inner": settings.get("ffn_hidden_size") or 4 * settings["hidden_size"]}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    our_type="gpt",
    weights=weights,
    root="transformer.",
    fixed={
        **FIXED,
        "bias_gelu_fusion": True,  # the tanh form of gelu
        "apply_residual_connection_post_layernorm": False,
    },
    renamed={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
    },
    defaults={"layer_norm_epsilon": 1e-5, "n_positions": 1024},
    expected={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    read=_read,
    write=_write,
    hints={"seq_length": "n_positions", "attention_dropout": "attn_pdrop", "hidden_dropout": "resid_pdrop"},
)
