"""Retrieval by two encoders."""

from __future__ import annotations

from megatron.core.models.biencoder.biencoder_model import BiEncoderModel, TextEmbedder

__all__ = ["BiEncoderModel", "TextEmbedder"]
