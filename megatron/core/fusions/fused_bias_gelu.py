"""gelu(x + bias) in the tanh approximation (Hendrycks & Gimpel, arXiv:1606.08415, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bias_gelu(bias: Tensor | None, y: Tensor) -> Tensor:
    """gelu(y + bias), tanh approximation."""
    return torch.nn.functional.gelu(y if bias is None else y + bias, approximate="tanh")


def bias_gelu_back(g: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Gradient with respect to y + bias of `bias_gelu`, for output gradient g."""
    return torch.ops.aten.gelu_backward(g, y if bias is None else y + bias, approximate="tanh")


class GeLUFunction(torch.autograd.Function):
    """`bias_gelu` that keeps one tensor for backward: x + bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None) -> Tensor:
        x = input if bias is None else input + bias
        ctx.save_for_backward(x)
        ctx.has_bias = bias is not None
        return bias_gelu(None, x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
        (x,) = ctx.saved_tensors
        grad = bias_gelu_back(grad_output, None, x)
        return grad, _sum_to_last_dim(grad) if ctx.has_bias else None


def _sum_to_last_dim(grad: Tensor) -> Tensor:
    """[..., f] -> [f]: the gradient of a bias."""
    return grad.flatten(0, -2).sum(0)


def bias_gelu_impl(input: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(input + bias), tanh approximation; input [..., f], bias [f] or None."""
    return GeLUFunction.apply(input, bias)
