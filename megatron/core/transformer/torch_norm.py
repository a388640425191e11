"""Norms in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm


class WrappedTorchNorm(FusedLayerNorm):
    """LayerNorm or RMSNorm, as `config.normalization` says; the public name of the plain norm."""


class L2Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, without parameters; statistics in fp32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
