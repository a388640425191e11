"""Public import path of the rotary functions."""

from __future__ import annotations

from megatron.core.transformer.rotary import (
    _apply_rotary_pos_emb_bshd,
    apply_rotary_pos_emb,
    get_pos_emb_on_this_cp_rank,
)

__all__ = ["_apply_rotary_pos_emb_bshd", "apply_rotary_pos_emb", "get_pos_emb_on_this_cp_rank"]
