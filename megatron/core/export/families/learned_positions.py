"""What the families around BERT and GPT-2 have in common: learned positions, LayerNorm, biases, tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import require

FIXED: Mapping[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "apply_layernorm_1p": False,
    "add_bias_linear": True,
    "swiglu": False,
    "geglu": False,
    "softmax_scale": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "squared_relu": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "group_query_attention": False,
    "window_size": None,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
}
"""Settings of ours that all of them have."""


def read_heads(width: int, heads: int) -> dict[str, Any]:
    """Heads share the width among them."""
    return {"kv_channels": width // heads}


def require_heads(settings: Mapping[str, Any]) -> None:
    """Raise `NotExpressible` for heads of another width than their share."""
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    kv = settings.get("kv_channels")
    require(kv in (None, width // heads), f"kv_channels {kv} is not hidden_size / num_attention_heads")
