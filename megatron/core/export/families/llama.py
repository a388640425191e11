"""Llama 1 to 3, Mistral, Yi, Qwen2 and Qwen3: RMSNorm, SwiGLU, rotary halves, grouped queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..family import Family, require
from ..weights import KINDS, ModelShape, Weight, fused_qkv, same, stacked
from .rope import read_rope, write_rope

Block = Callable[[ModelShape, int, str, str], Iterator[Weight]]
"""(shape, number of a layer, beginnings of our and of their names in it) -> the rows of one of its blocks."""
HINTS = {
    "max_position_embeddings": "max_position_embeddings",
    "seq_length": "max_position_embeddings",
    "attention_dropout": "attention_dropout",
}
"""See `Family.hints`."""


def dense(shape: ModelShape, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """A gated feed-forward block."""
    yield from gated(shape, f"{ours}mlp.", f"{theirs}mlp.")


def gated(shape: ModelShape, ours: str, theirs: str) -> Iterator[Weight]:
    """Two projections side by side, of which one gates the other, and one back."""
    for kind in KINDS if shape.add_bias_linear else KINDS[:1]:
        yield stacked(f"{ours}linear_fc1.{kind}", f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}")
        yield same(f"{ours}linear_fc2.{kind}", f"{theirs}down_proj.{kind}")


def grouped_queries(shape: ModelShape, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """Attention whose query, key and value are projections of the hidden states."""
    for kind in KINDS if shape.add_qkv_bias or shape.add_bias_linear else KINDS[:1]:
        names = [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"]
        yield fused_qkv(shape, f"{ours}self_attention.linear_qkv.{kind}", *names)
    if shape.qk_layernorm:
        for part in "qk":
            yield same(f"{ours}self_attention.{part}_layernorm.weight", f"{theirs}self_attn.{part}_norm.weight")
    for kind in KINDS if shape.add_bias_linear else KINDS[:1]:
        yield same(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}self_attn.o_proj.{kind}")


def weights(shape: ModelShape, feed_forward: Block = dense, attention: Block = grouped_queries) -> Iterator[Weight]:
    """Key map of `LlamaForCausalLM` and its relatives."""
    yield same("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for n in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
        yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
        yield from attention(shape, n, ours, theirs)
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight")
        yield from feed_forward(shape, n, ours, theirs)
    yield same("decoder.final_layernorm.weight", "model.norm.weight")
    if not shape.tied:
        yield same("output_layer.weight", "lm_head.weight")


# --- settings that the relatives share ------------------------------------------------------------------


def _read_common(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    grouping = {"group_query_attention": groups != heads}
    if groups != heads:
        grouping["num_query_groups"] = groups
    tied = config.get("tie_word_embeddings", False)
    return {
        **read_rope(config),
        **grouping,
        "kv_channels": config.get("head_dim") or hidden // heads,
        "untie_embeddings_and_output_weights": not tied,
    }


def _write_common(settings: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    groups = settings["num_query_groups"] if settings.get("group_query_attention") else heads
    return {
        **write_rope(settings),
        "num_key_value_heads": groups,
        "head_dim": settings.get("kv_channels") or hidden // heads,
        "tie_word_embeddings": not settings.get("untie_embeddings_and_output_weights"),
    }


def window_of(sliding_window: int | None) -> list[int] | None:
    """Their window counts the token itself; ours are the tokens to its left."""
    return None if sliding_window is None else [sliding_window - 1, 0]


def _no_window(settings: Mapping[str, Any]) -> None:
    require(not settings.get("window_size"), f"window_size is {settings.get('window_size')}")


def _biases(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    linear = bool(settings.get("add_bias_linear", True))
    return linear, linear or bool(settings.get("add_qkv_bias"))


# --- Llama ----------------------------------------------------------------------------------------------


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    require(attention == mlp, f"attention_bias {attention} with mlp_bias {mlp}: all linear layers have biases or none")
    biases = {"add_bias_linear": mlp, "add_qkv_bias": attention}
    return {**_read_common(config), **biases, "window_size": None, "qk_layernorm": False}


def _write_llama(settings: Mapping[str, Any]) -> dict[str, Any]:
    linear, qkv = _biases(settings)
    require(linear == qkv, "only query, key and value have biases")
    require(not settings.get("qk_layernorm"), "qk_layernorm is set")
    _no_window(settings)
    return {**_write_common(settings), "attention_bias": qkv, "mlp_bias": linear}


# --- Mistral --------------------------------------------------------------------------------------------


def read_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    window = window_of(config.get("sliding_window"))
    biases = {"add_bias_linear": False, "add_qkv_bias": False}
    return {**_read_common(config), **biases, "window_size": window, "qk_layernorm": False}


def write_mistral(settings: Mapping[str, Any]) -> dict[str, Any]:
    require(_biases(settings) == (False, False), "linear layers have biases")
    require(not settings.get("qk_layernorm"), "qk_layernorm is set")
    return {**_write_common(settings), "sliding_window": _window(settings)}


def _window(settings: Mapping[str, Any]) -> int | None:
    window = settings.get("window_size")
    if not window:
        return None
    left, right = window
    require(right == 0 and left >= 0, f"window_size is {tuple(window)}")
    return left + 1


# --- Qwen -----------------------------------------------------------------------------------------------


def _read_qwen_window(config: Mapping[str, Any]) -> list[int] | None:
    """Qwen can give a window to its upper layers only; here all have it, or none."""
    kinds = set(config.get("layer_types") or [])
    if not kinds and config.get("use_sliding_window"):
        full = min(config.get("max_window_layers", 0), config["num_hidden_layers"])
        kinds = {"full_attention"} if full == config["num_hidden_layers"] else {"sliding_attention"}
        kinds |= {"full_attention"} if full else set()
    require(len(kinds) < 2, "a window in some of the layers only is not built")
    windowed = kinds == {"sliding_attention"}
    require(windowed or kinds <= {"full_attention"}, f"layer_types {sorted(kinds)}")
    return window_of(config["sliding_window"]) if windowed else None


def _write_qwen_window(settings: Mapping[str, Any]) -> dict[str, Any]:
    window = _window(settings)
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": settings["num_layers"] if window is None else 0,
        "layer_types": [kind] * settings["num_layers"],
    }


def read_qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"add_bias_linear": False, "add_qkv_bias": True}
    return {**_read_common(config), **biases, "window_size": _read_qwen_window(config), "qk_layernorm": False}


def write_qwen2(settings: Mapping[str, Any]) -> dict[str, Any]:
    require(_biases(settings) == (False, True), "not query, key and value alone have biases")
    require(not settings.get("qk_layernorm"), "qk_layernorm is set")
    width = settings["hidden_size"] // settings["num_attention_heads"]
    require(settings.get("kv_channels") in (None, width), f"kv_channels is {settings.get('kv_channels')}, not {width}")
    return {**_write_common(settings), **_write_qwen_window(settings)}


def read_qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    biases = {"add_bias_linear": False, "add_qkv_bias": False}
    return {**_read_common(config), **biases, "window_size": _read_qwen_window(config), "qk_layernorm": True}


def write_qwen3(settings: Mapping[str, Any]) -> dict[str, Any]:
    require(_biases(settings) == (False, False), "linear layers have biases")
    require(settings.get("qk_layernorm"), "qk_layernorm is not set")
    return {**_write_common(settings), **_write_qwen_window(settings)}


def relative(
    model_type: str,
    architecture: str,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    write: Callable[[Mapping[str, Any]], dict[str, Any]],
    **expected: tuple[Any, ...],
) -> Family:
    """A family that differs from Llama in what `read` and `write` say."""
    return Family(
        model_type=model_type,
        architecture=architecture,
        our_type="gpt",
        weights=weights,
        root="model.",
        fixed={
            "normalization": "RMSNorm",
            "apply_layernorm_1p": False,
            "swiglu": True,
            "geglu": False,
            "softmax_scale": None,
            "multi_latent_attention": False,
            "mtp_num_layers": None,
            "squared_relu": False,
            "qk_l2_norm": False,
            "apply_residual_connection_post_layernorm": False,
            "num_experts": None,
        },
        renamed={
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_attention_heads": "num_attention_heads",
            "norm_epsilon": "rms_norm_eps",
        },
        defaults={"rms_norm_eps": 1e-6},
        expected={"hidden_act": ("silu", "swish"), **expected},
        read=read,
        write=write,
        hints=HINTS,
    )


LLAMA = relative("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = relative("mistral", "MistralForCausalLM", read_mistral, write_mistral)
QWEN2 = relative("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2)
QWEN3 = relative("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, attention_bias=(False,))
