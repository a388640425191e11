"""Angles of rotary positions, under the name of the public interface."""

from __future__ import annotations

from megatron.core.transformer.rotary import apply_rotary_pos_emb, get_pos_emb_on_this_cp_rank
from megatron.core.transformer.rotary_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
    inverse_frequencies,
    repeated_angles,
    scale_frequencies,
)

__all__ = [
    "MultimodalRotaryEmbedding",
    "RotaryEmbedding",
    "apply_rotary_pos_emb",
    "get_pos_emb_on_this_cp_rank",
    "inverse_frequencies",
    "repeated_angles",
    "scale_frequencies",
]
