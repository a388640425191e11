"""RMSNorm, y = x / sqrt(mean(x^2) + eps) * gamma (arXiv:1910.07467), in fp32 for half precision too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one fp32 number for each row; x^ = x / rms is recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, rstd)
        return torch.mul(wide, rstd).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, rstd = ctx.saved_tensors
        grad = _wide(grad_output)
        normalized = _wide(x) * rstd
        product = grad * normalized
        grad_gain = product.flatten(0, -2).sum(0)
        # dx = rstd * (g * gain - x^ * mean(g * gain * x^))
        mean = product.mul_(gain).mean(dim=-1, keepdim=True)
        grad_x = torch.mul(grad, gain, out=product)
        grad_x.addcmul_(normalized, mean, value=-1.0).mul_(rstd)
        return grad_x.to(x.dtype), grad_gain.to(gain.dtype), None


def _wide(x: Tensor) -> Tensor:
    """x itself, or an fp32 copy where it is half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """x [..., h] divided by the root mean square of each row, times gamma [h], in the type of x.

    Args:
        zero_centered: `weight` is gamma - 1.
    """
    gain = _wide(weight) + 1.0 if zero_centered else _wide(weight)
    if x.is_cuda and x.dtype == torch.float32:
        return torch.nn.functional.rms_norm(x, (x.size(-1),), gain, eps)
    return _RMSNorm.apply(x, gain, eps)
