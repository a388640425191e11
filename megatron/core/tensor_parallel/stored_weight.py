"""What stands in the place of a linear layer's weight where a model is only run forward."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class StoredWeight(nn.Module):
    """A weight [n, k] in a form of its own."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, [..., n] of x [..., k], in the type of x."""


def can_pack(weight: Tensor) -> bool:
    """Whether `PackedWeight` is faster: fp32, or bf16 that the processor multiplies, on a CPU with oneDNN."""
    return weight.device.type == "cpu" and _packs(weight.dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a packed matrix of the type; tried once: the operations are not public ones."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight, x = PackedWeight(torch.ones(32, 16, dtype=dtype)), torch.ones(2, 16, dtype=dtype)
        found = [weight.multiply(x)]
        weight.applies_gelu = True
        found.append(weight.multiply(x))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return all(bool((product == 16).all()) for product in found)


class PackedWeight(StoredWeight):
    """A matrix in the order in which oneDNN reads it, so that a product with few rows need not put it in order first.

    The order is that of `TYPICAL_ROWS` rows, which products with more or fewer rows run well on too. Those with fewer
    than `FEWEST_ROWS` take zeros with them: each number that comes from memory is used more often then, and the kernel
    for a single row waits longer for its sums than for the memory.
    """

    TYPICAL_ROWS = 16
    FEWEST_ROWS = 4

    applies_gelu = False
    """`multiply` gives gelu(x Wᵀ + b), in the tanh approximation, while the product is still in registers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.TYPICAL_ROWS)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.numel() // x.size(-1)
        if rows >= self.FEWEST_ROWS or rows == 0:
            return self._product(x, bias)
        filled = pad(x.reshape(rows, -1), (0, 0, 0, self.FEWEST_ROWS - rows))
        return self._product(filled, bias)[:rows].view(*x.shape[:-1], -1)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        name, kind = ("gelu", "tanh") if self.applies_gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, name, [], kind)
