"""Checkpoints of the classes before Megatron-Core: nested dictionaries, other names, other orders of rows.

The public BERT-345M and GPT-345M releases are of this kind. np heads on a tensor parallel rank, hn their width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LAYER_PARTS = (
    ("input_norm.", "input_layernorm."),
    ("self_attention.query_key_value.", "self_attention.linear_qkv."),
    ("self_attention.dense.", "self_attention.linear_proj."),
    ("post_attention_norm.", "pre_mlp_layernorm."),
    ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
)
"""Within a layer: older name, ours."""
_OTHERS = (
    ("language_model.embedding.", "embedding."),
    ("language_model.output_layer.", "output_layer."),
    ("language_model.pooler.dense.", "pooler.dense."),
    ("lm_head.dense.", "lm_head.dense."),
    ("lm_head.norm.", "lm_head.layer_norm."),
    ("lm_head.bias", "output_layer.bias"),
    ("binary_head.", "binary_head."),
)
_COPY_OF_EMBEDDING = "word_embeddings_for_head."


def is_legacy(model: Mapping[str, Any]) -> bool:
    """Whether a saved model is of the older classes."""
    return any(str(key).startswith("language_model") for key in model)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted names; what is no tensor (empty extra states) is left out."""
    flat: dict[str, Tensor] = {}
    for key, value in nested.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
    return flat


def nest(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dictionaries that the older classes load: `language_model` has its parts, whose parameters are flat."""
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        depth = 3 if name.startswith("language_model.embedding.") else 2 if name.startswith("language_model.") else 1
        *outer, last = name.split(".", depth)
        place = nested
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = tensor
    return nested


def from_legacy_name(name: str, block: str) -> str | None:
    """Our name; None for a copy of the embedding.

    Args:
        name: dotted, of any age.
        block: what our layers stand in, `decoder` (GPT) or `encoder` (BERT).

    Raises:
        ValueError: no parameter of a GPT or BERT has that name.
    """
    if name.startswith(_COPY_OF_EMBEDDING):
        return None
    modern = name.replace(".attention.", ".self_attention.").replace("layernorm", "norm")
    modern = modern.replace("language_model.transformer.", "language_model.encoder.")
    head, found, rest = modern.partition("language_model.encoder.")
    if found and not head:
        layer = re.match(r"layers\.\d+\.", rest)
        if layer is None:
            return _renamed(rest, (("final_norm.", "final_layernorm."),), f"{block}.", name)
        return _renamed(rest[layer.end() :], _LAYER_PARTS, f"{block}.{layer[0]}", name)
    return _renamed(modern, _OTHERS, "", name)


def _renamed(rest: str, table: tuple[tuple[str, str], ...], prefix: str, name: str) -> str:
    for older, ours in table:
        if rest.startswith(older):
            return f"{prefix}{ours}{rest[len(older) :]}"
    raise ValueError(f"{name} is no parameter of a GPT or BERT of the older classes")


def to_legacy_name(name: str) -> str:
    """Inverse of `from_legacy_name`, the youngest of its names.

    Raises:
        ValueError: the older classes have no such parameter.
    """
    match = re.fullmatch(r"(?:decoder|encoder)\.(?:(layers\.\d+\.)(.*)|final_layernorm\.(.*))", name)
    if match is None:
        return _renamed(name, tuple((ours, older) for older, ours in _OTHERS), "", name)
    if match[1] is None:
        return f"language_model.encoder.final_norm.{match[3]}"
    table = tuple((ours, older) for older, ours in _LAYER_PARTS)
    return _renamed(match[2], table, f"language_model.encoder.{match[1]}", name)


def reorder_rows(name: str, part: Tensor, heads: int, version: float) -> Tensor:
    """Rows of a fused projection of one rank in today's order, [np, 3, hn] (cross attention's key and value: 2).

    Args:
        name: ours.
        heads: np.
        version: `checkpoint_version`; 0 had [3, np, hn], 1 had [np, hn, 3].
    """
    match = re.search(r"\.linear_(qkv|kv)\.(weight|bias)$", name)
    if version >= 2 or match is None:
        return part
    count = 3 if match[1] == "qkv" else 2
    rest = part.shape[1:]
    if version >= 1:
        return part.reshape(heads, -1, count, *rest).transpose(1, 2).reshape(part.shape).contiguous()
    return part.reshape(count, heads, -1, *rest).transpose(0, 1).reshape(part.shape).contiguous()


def rows_of_version(part: Tensor, heads: int, version: float, count: int = 3) -> Tensor:
    """Inverse of `reorder_rows`."""
    rest = part.shape[1:]
    if version >= 2:
        return part
    today = part.reshape(heads, count, -1, *rest)
    older = today.transpose(1, 2) if version >= 1 else today.transpose(0, 1)
    return torch.reshape(older, part.shape).contiguous()
