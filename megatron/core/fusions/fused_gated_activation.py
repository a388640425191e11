"""act(a) * b of x = [a ; b], the halves of the last dimension (gated linear units, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
ActivationBackward = Callable[[Tensor, Tensor, Tensor], object]
"""(output gradient, x, where to write the gradient of x)"""


class GatedActivation(torch.autograd.Function):
    """act(a) * b that keeps only x for backward and writes both halves of its gradient into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, activation: Activation, backward: ActivationBackward
    ) -> Tensor:
        x = input if bias is None else input + bias
        ctx.save_for_backward(x)
        ctx.activation, ctx.activation_backward, ctx.has_bias = activation, backward, bias is not None
        gate, up = x.chunk(2, dim=-1)
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_output, ctx.activation(gate), out=grad_up)
        ctx.activation_backward(grad_output * up, gate, grad_gate)
        return grad, grad.flatten(0, -2).sum(0) if ctx.has_bias else None, None, None
