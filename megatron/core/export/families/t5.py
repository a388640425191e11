"""T5 of version 1.1: an encoder and a decoder with relative positions, and an output weight of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..family import Family, require
from ..weights import ModelShape, Weight, fused_heads, fused_qkv, same, stacked


def t5_weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of `T5ForConditionalGeneration` of version 1.1."""
    yield same("embedding.word_embeddings.weight", "shared.weight")
    yield from _stack("encoder", shape.encoder_num_layers or shape.num_layers, shape)
    yield from _stack("decoder", shape.num_layers, shape)
    yield same("lm_head.output_layer.weight", "lm_head.weight")


def _stack(name: str, num_layers: int, shape: ModelShape) -> Iterator[Weight]:
    table = "relative_attention_bias.weight"
    yield same(f"{name}_relative_pos_emb.{table}", f"{name}.block.0.layer.0.SelfAttention.{table}")
    for n in range(num_layers):
        ours, theirs = f"{name}.layers.{n}.", f"{name}.block.{n}.layer."
        attention = f"{theirs}0.SelfAttention."
        yield same(f"{ours}input_layernorm.weight", f"{theirs}0.layer_norm.weight")
        parts = [f"{attention}{part}.weight" for part in "qkv"]
        yield fused_qkv(shape, f"{ours}self_attention.linear_qkv.weight", *parts)
        yield same(f"{ours}self_attention.linear_proj.weight", f"{attention}o.weight")
        if name == "decoder":
            yield from _cross_attention(shape, ours, f"{theirs}1.")
        last = f"{theirs}{2 if name == 'decoder' else 1}."
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{last}layer_norm.weight")
        gate_and_up = (f"{last}DenseReluDense.wi_0.weight", f"{last}DenseReluDense.wi_1.weight")
        yield stacked(f"{ours}mlp.linear_fc1.weight", *gate_and_up)
        yield same(f"{ours}mlp.linear_fc2.weight", f"{last}DenseReluDense.wo.weight")
    yield same(f"{name}.final_layernorm.weight", f"{name}.final_layer_norm.weight")


def _cross_attention(shape: ModelShape, ours: str, theirs: str) -> Iterator[Weight]:
    attention = f"{theirs}EncDecAttention."
    yield same(f"{ours}pre_cross_attn_layernorm.weight", f"{theirs}layer_norm.weight")
    yield same(f"{ours}cross_attention.linear_q.weight", f"{attention}q.weight")
    key_and_value = (f"{attention}k.weight", f"{attention}v.weight")
    yield fused_heads(shape.num_attention_heads, f"{ours}cross_attention.linear_kv.weight", *key_and_value)
    yield same(f"{ours}cross_attention.linear_proj.weight", f"{attention}o.weight")


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a missing key means is of version 1.0, which is another model."""
    activation = config.get("feed_forward_proj", "relu")
    require(activation == "gated-gelu", f"feed_forward_proj is {activation!r}, only 'gated-gelu' can be computed")
    # Older releases of transformers say by the first key, newer ones by the second, that logits are not scaled.
    scaled = config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs", True)
    require(not scaled, "logits are scaled, as by a T5 of version 1.0 with tied embeddings")
    encoder = config["num_layers"]
    return {
        "num_layers": encoder,
        "encoder_num_layers": encoder,
        "decoder_num_layers": config.get("num_decoder_layers") or encoder,
    }


def _write(settings: Mapping[str, Any]) -> dict[str, Any]:
    encoder = settings.get("encoder_num_layers") or settings["num_layers"]
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    return {
        "num_layers": encoder,
        "num_decoder_layers": settings.get("decoder_num_layers") or encoder,
        "d_kv": settings.get("kv_channels") or width // heads,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
        "decoder_start_token_id": 0,
    }


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    our_type="t5",
    weights=t5_weights,
    fixed={
        "position_embedding_type": "relative",
        "normalization": "RMSNorm",
        "apply_layernorm_1p": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "geglu": True,
        "swiglu": False,
        "squared_relu": False,
        "softmax_scale": 1.0,
        "qk_layernorm": False,
        "qk_l2_norm": False,
        "group_query_attention": False,
        "window_size": None,
        "apply_residual_connection_post_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "num_experts": None,
    },
    renamed={
        "hidden_size": "d_model",
        "ffn_hidden_size": "d_ff",
        "kv_channels": "d_kv",
        "num_attention_heads": "num_heads",
        "norm_epsilon": "layer_norm_epsilon",
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "relative_attention_max_distance": "relative_attention_max_distance",
    },
    defaults={
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "d_kv": 64,
    },
    expected={"feed_forward_proj": ("gated-gelu",)},
    read=_read,
    write=_write,
    hints={
        "seq_length": "n_positions",
        "max_position_embeddings": "n_positions",
        "attention_dropout": "dropout_rate",
        "hidden_dropout": "dropout_rate",
    },
)
