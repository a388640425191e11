"""Older import path of the plain norm."""

from __future__ import annotations

from megatron.core.transformer.torch_norm import WrappedTorchNorm as WrappedTorchLayerNorm

__all__ = ["WrappedTorchLayerNorm"]
