"""What stands in the place of a linear layer's weight where a model is only run forward."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn


class StoredWeight(nn.Module):
    """A weight [n, k] in a form of its own."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, [..., n] of x [..., k], in the type of x."""


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedWeight` is faster: bf16 on a CPU that multiplies it."""
    has_products = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and has_products


class PackedWeight(StoredWeight):
    """bf16 in the order in which oneDNN reads it, so that a product with few rows need not put it in order first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.size(0)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
