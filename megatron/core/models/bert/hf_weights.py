"""Weights of a BERT under the names of Hugging Face transformers, read both ways (see `models.gpt.hf_weights`)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.gpt.hf_weights import Weight, fused_qkv
from megatron.core.transformer.transformer_config import TransformerConfig

_KINDS = ("weight", "bias")


def bert_weights(config: TransformerConfig, *, heads: bool = True) -> Iterator[Weight]:
    """`BertForPreTraining`, or, without heads, `BertModel`: norms after the residual sums.

    With `apply_residual_connection_post_layernorm` our layers start from normed values, so each of their norms is
    ours one place further on, and that of the embeddings our first.
    """
    last = config.num_layers - 1
    root = "bert." if heads else ""
    yield from _common(config, root)
    for kind in _KINDS:
        yield Weight(f"encoder.layers.0.input_layernorm.{kind}", (f"{root}embeddings.LayerNorm.{kind}",))
        for n in range(config.num_layers):
            theirs = f"{root}encoder.layer.{n}."
            following = f"layers.{n + 1}.input_layernorm" if n < last else "final_layernorm"
            yield Weight(
                f"encoder.layers.{n}.pre_mlp_layernorm.{kind}", (f"{theirs}attention.output.LayerNorm.{kind}",)
            )
            yield Weight(f"encoder.{following}.{kind}", (f"{theirs}output.LayerNorm.{kind}",))
    if heads:
        yield from _heads()


def megatron_bert_weights(config: TransformerConfig, *, heads: bool = True) -> Iterator[Weight]:
    """`MegatronBertForPreTraining`, or, without heads, `MegatronBertModel`: norms where ours are."""
    root = "bert." if heads else ""
    yield from _common(config, root)
    for kind in _KINDS:
        for n in range(config.num_layers):
            ours, theirs = f"encoder.layers.{n}.", f"{root}encoder.layer.{n}."
            yield Weight(f"{ours}input_layernorm.{kind}", (f"{theirs}attention.ln.{kind}",))
            yield Weight(f"{ours}pre_mlp_layernorm.{kind}", (f"{theirs}ln.{kind}",))
        yield Weight(f"encoder.final_layernorm.{kind}", (f"{root}encoder.ln.{kind}",))
    if heads:
        yield from _heads()


def _common(config: TransformerConfig, root: str) -> Iterator[Weight]:
    """Embeddings, linear layers and pooler, which both kinds name alike."""
    for ours, theirs in (("word", "word"), ("position", "position"), ("tokentype", "token_type")):
        yield Weight(f"embedding.{ours}_embeddings.weight", (f"{root}embeddings.{theirs}_embeddings.weight",))
    for kind in _KINDS:
        for n in range(config.num_layers):
            ours, theirs = f"encoder.layers.{n}.", f"{root}encoder.layer.{n}."
            parts = [f"{theirs}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            yield fused_qkv(config, f"{ours}self_attention.linear_qkv.{kind}", *parts)
            yield Weight(f"{ours}self_attention.linear_proj.{kind}", (f"{theirs}attention.output.dense.{kind}",))
            yield Weight(f"{ours}mlp.linear_fc1.{kind}", (f"{theirs}intermediate.dense.{kind}",))
            yield Weight(f"{ours}mlp.linear_fc2.{kind}", (f"{theirs}output.dense.{kind}",))
        yield Weight(f"pooler.dense.{kind}", (f"{root}pooler.dense.{kind}",))


def _heads() -> Iterator[Weight]:
    for kind in _KINDS:
        yield Weight(f"lm_head.dense.{kind}", (f"cls.predictions.transform.dense.{kind}",))
        yield Weight(f"lm_head.layer_norm.{kind}", (f"cls.predictions.transform.LayerNorm.{kind}",))
        yield Weight(f"binary_head.{kind}", (f"cls.seq_relationship.{kind}",))
    yield Weight("output_layer.bias", ("cls.predictions.bias",))
