"""Causal convolution over the sequence, each channel for itself. s sequence, b microbatch, c channels, k taps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.extensions.mamba_kernels import conv_kernel_fits, kernel_conv


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[s, b, c]: y_t = sum over i of weight_i x_{t-k+1+i}, plus bias; x is 0 before the first token.

    Args:
        x: [s, b, c].
        weight: [c, 1, k], as of `nn.Conv1d` with as many groups as channels.
        bias: [c].
    """
    if conv_kernel_fits(x, weight.size(-1)):
        return kernel_conv(x, weight, bias)
    return _CausalConv.apply(x, weight, bias)


class _CausalConv(torch.autograd.Function):
    """Shifted multiply-adds: no copy in another order of dimensions, as torch's convolutions want it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        taps = weight.squeeze(1).unbind(-1)
        y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for distance, tap in enumerate(reversed(taps[:-1]), start=1):
            y[distance:].addcmul_(x[:-distance], tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = weight.squeeze(1).unbind(-1)
        grad_x, grads = grad_y * taps[-1], [(grad_y * x).sum((0, 1))]
        for distance, tap in enumerate(reversed(taps[:-1]), start=1):
            later, earlier = grad_y[distance:], x[:-distance]
            grad_x[:-distance].addcmul_(later, tap)
            grads.append((later * earlier).sum((0, 1)))
        grad_weight = torch.stack(grads[::-1], dim=-1).unsqueeze(1)
        return grad_x, grad_weight, grad_y.sum((0, 1)) if ctx.has_bias else None


def last_inputs(x: Tensor, taps: int) -> Tensor:
    """[b, c, k]: what the next tokens' convolution still sees of x [s, b, c]."""
    missing = max(taps - x.size(0), 0)
    return F.pad(x[-taps:], (0, 0, 0, 0, missing, 0)).permute(1, 2, 0).contiguous()


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[b, c] of one token x [b, c] more; changes `state` [b, c, k], the last k inputs, in place."""
    state.copy_(torch.cat((state[..., 1:], x.to(state.dtype).unsqueeze(-1)), dim=-1))
    y = (state * weight.squeeze(1)).sum(-1)
    return y if bias is None else y + bias
