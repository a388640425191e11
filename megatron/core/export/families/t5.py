"""T5 of version 1.1: an encoder and a decoder with relative positions, and an output weight of its own."""

from __future__ import annotations

from collections.abc import Iterator

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
