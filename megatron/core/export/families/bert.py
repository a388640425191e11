"""BERT, whose norms follow the residual sums, and Megatron-LM's BERT, whose norms are where ours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..family import Family
from ..weights import KINDS, ModelShape, Weight, fused_qkv, same
from .learned_positions import FIXED, read_heads, require_heads

HEADS = ("lm_head.", "binary_head.", "output_layer.", "pooler.")


def bert_weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of `BertForPreTraining`.

    With `apply_residual_connection_post_layernorm` our layers start from normed values, so each of their norms is
    ours one place further on, and that of the embeddings our first.
    """
    last = shape.num_layers - 1
    yield from _common(shape)
    for kind in KINDS:
        yield same(f"encoder.layers.0.input_layernorm.{kind}", f"bert.embeddings.LayerNorm.{kind}")
        for n in range(shape.num_layers):
            theirs = f"bert.encoder.layer.{n}."
            following = f"layers.{n + 1}.input_layernorm" if n < last else "final_layernorm"
            yield same(f"encoder.layers.{n}.pre_mlp_layernorm.{kind}", f"{theirs}attention.output.LayerNorm.{kind}")
            yield same(f"encoder.{following}.{kind}", f"{theirs}output.LayerNorm.{kind}")
    yield from _heads(shape)


def megatron_bert_weights(shape: ModelShape) -> Iterator[Weight]:
    """Key map of `MegatronBertForPreTraining`."""
    yield from _common(shape)
    for kind in KINDS:
        for n in range(shape.num_layers):
            ours, theirs = f"encoder.layers.{n}.", f"bert.encoder.layer.{n}."
            yield same(f"{ours}input_layernorm.{kind}", f"{theirs}attention.ln.{kind}")
            yield same(f"{ours}pre_mlp_layernorm.{kind}", f"{theirs}ln.{kind}")
        yield same(f"encoder.final_layernorm.{kind}", f"bert.encoder.ln.{kind}")
    yield from _heads(shape)


def _common(shape: ModelShape) -> Iterator[Weight]:
    """Embeddings and linear layers, which both kinds name alike."""
    tables = [("word", "word"), ("position", "position")]
    for ours, theirs in tables + [("tokentype", "token_type")] * bool(shape.num_tokentypes):
        yield same(f"embedding.{ours}_embeddings.weight", f"bert.embeddings.{theirs}_embeddings.weight")
    for kind in KINDS:
        for n in range(shape.num_layers):
            ours, theirs = f"encoder.layers.{n}.", f"bert.encoder.layer.{n}."
            parts = [f"{theirs}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            yield fused_qkv(shape, f"{ours}self_attention.linear_qkv.{kind}", *parts)
            yield same(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}attention.output.dense.{kind}")
            yield same(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}intermediate.dense.{kind}")
            yield same(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}output.dense.{kind}")


def _heads(shape: ModelShape) -> Iterator[Weight]:
    for kind in KINDS:
        yield same(f"lm_head.dense.{kind}", f"cls.predictions.transform.dense.{kind}")
        yield same(f"lm_head.layer_norm.{kind}", f"cls.predictions.transform.LayerNorm.{kind}")
        if shape.binary_head:
            yield same(f"pooler.dense.{kind}", f"bert.pooler.dense.{kind}")
            yield same(f"binary_head.{kind}", f"cls.seq_relationship.{kind}")
    yield same("output_layer.bias", "cls.predictions.bias")


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return read_heads(config["hidden_size"], config["num_attention_heads"])


def _write(settings: Mapping[str, Any]) -> dict[str, Any]:
    require_heads(settings)
    return {}


_BERT = Family(
    model_type="bert",
    architecture="BertForPreTraining",
    our_type="bert",
    weights=bert_weights,
    root="bert.",
    optional=HEADS,
    fixed={
        **FIXED,
        "bias_gelu_fusion": False,  # gelu itself, not its tanh form
        "apply_residual_connection_post_layernorm": True,
        "bert_binary_head": True,
    },
    renamed={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "norm_epsilon": "layer_norm_eps",
    },
    defaults={"layer_norm_eps": 1e-12, "max_position_embeddings": 512},
    expected={
        "hidden_act": ("gelu", "gelu_python"),
        "position_embedding_type": ("absolute",),
        "type_vocab_size": (2,),
        "is_decoder": (False,),
        "tie_word_embeddings": (True,),
    },
    read=_read,
    write=_write,
    hints={
        "seq_length": "max_position_embeddings",
        "attention_dropout": "attention_probs_dropout_prob",
        "hidden_dropout": "hidden_dropout_prob",
    },
)


def _sister(model_type: str, architecture: str, weights: Callable[[ModelShape], Any], post_norm: bool) -> Family:
    fixed = {**_BERT.fixed, "apply_residual_connection_post_layernorm": post_norm}
    return replace(_BERT, model_type=model_type, architecture=architecture, weights=weights, fixed=fixed)


BERT = _BERT
MEGATRON_BERT = _sister("megatron-bert", "MegatronBertForPreTraining", megatron_bert_weights, False)
