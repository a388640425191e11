"""Embeddings of tokens and positions."""

from __future__ import annotations

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

__all__ = ["MultimodalRotaryEmbedding", "RotaryEmbedding", "YarnRotaryEmbedding", "apply_rotary_pos_emb"]
