"""gelu(a) * b of x + bias = [a ; b], tanh approximation (GeGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.fusions.fused_gated_activation import GatedActivation


def geglu(y: Tensor) -> Tensor:
    """gelu(first half) * second half of the last dimension."""
    gate, up = y.chunk(2, dim=-1)
    return _gelu(gate) * up


def bias_geglu(bias: Tensor, y: Tensor) -> Tensor:
    """`geglu` of y + bias."""
    return geglu(y + bias)


def bias_geglu_impl(input: Tensor, bias: Tensor | None) -> Tensor:
    """`geglu` of input + bias, keeping one tensor for backward; input [..., 2f] -> [..., f]."""
    return GatedActivation.apply(input, bias, _gelu, _gelu_backward)


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
