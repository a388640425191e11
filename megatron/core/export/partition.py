"""How parameters are cut over tensor parallel ranks, by name: joining and cutting whole tensors without a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_AXES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"embedding\.word_embeddings\.weight|(lm_head\.)?output_layer\.(weight|bias)"), 0),
    (re.compile(r".*\.layers\..*\.linear_(qkv|q|kv|fc1)\.(weight|bias)"), 0),
    (re.compile(r".*\.layers\..*\.linear_(proj|fc2)\.weight"), 1),
    (re.compile(r".*\.mixer\.((in_proj|conv1d)\.(weight|bias)|dt_bias|A_log|D|norm\.weight)"), 0),
    (re.compile(r".*\.mixer\.out_proj\.weight"), 1),
    (re.compile(r".*_relative_pos_emb\.relative_attention_bias\.weight"), 1),
)


def axis_of(name: str) -> int | None:
    """The axis that tensor parallel ranks share; None for a parameter that each of them has."""
    return next((axis for pattern, axis in _AXES if pattern.fullmatch(name)), None)


def _blocks(name: str, gated: bool) -> int:
    """Each rank has a part of each of so many blocks: the gate and the projection that it gates."""
    return 2 if gated and ".linear_fc1." in name else 1


def cut(name: str, whole: Tensor, rank: int, size: int, gated: bool, sections: Sequence[int] | None = None) -> Tensor:
    """The part of tensor parallel rank `rank` of `size`.

    Args:
        sections: lengths of tensors that `whole` stacks along the axis, each of which is cut on its own.

    Raises:
        ValueError: it cannot be cut in equal parts.
    """
    axis = axis_of(name)
    if axis is None or size == 1:
        return whole
    if sections is not None:
        if any(length % size for length in sections):
            raise ValueError(f"{name}: parts of {list(sections)} rows cannot be cut for {size} ranks")
        return torch.cat([part.chunk(size, axis)[rank] for part in whole.split(list(sections), axis)], axis)
    if whole.size(axis) % (size * _blocks(name, gated)):
        raise ValueError(f"{name}: axis {axis} of {list(whole.shape)} cannot be cut for {size} ranks")
    return torch.cat(whole.chunk(_blocks(name, gated) * size, axis)[rank::size], axis)


def join(name: str, parts: Sequence[Tensor], gated: bool, sections: Sequence[int] | None = None) -> Tensor:
    """Inverse of `cut`, of the parts of all ranks; `sections` are those of each part."""
    axis = axis_of(name)
    if axis is None or len(parts) == 1:
        return parts[0]
    if sections is not None:
        stacked = zip(*(part.split(list(sections), axis) for part in parts))
        return torch.cat([part for tensor in stacked for part in tensor], axis)
    blocks = zip(*(part.chunk(_blocks(name, gated), axis) for part in parts))
    return torch.cat([part for block in blocks for part in block], axis)
