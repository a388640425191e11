"""Rotation of channel pairs by given angles (RoFormer, arXiv:2104.09864, section 3.4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pair_views(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second members of each pair of channels: the two halves of a head, or even and odd
    channels."""
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    first, second = t.chunk(2, dim=-1)
    return first, second


class RotatePairs(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the first channels, the rest as they are.

    Keeps only cos and sin: the gradient is rotated back.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(t, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad_output, cos, -sin, ctx.interleaved), None, None, None


def rotated(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """t [..., d] rotated, in new memory.

    Args:
        cos: [..., r/2] fp32, one for each pair of the first r channels; broadcasts to t.
        sin: likewise.
    """
    width = 2 * cos.size(-1)
    # bf16 angles would be wrong by 1/256 of themselves; a mixed product would convert element by element.
    wide = t[..., :width].float()
    turned = torch.empty(t.shape, dtype=wide.dtype, device=t.device)
    x1, x2 = pair_views(wide, interleaved)
    y1, y2 = pair_views(turned[..., :width], interleaved)
    torch.mul(x1, cos, out=y1)
    y1.addcmul_(x2, sin, value=-1.0)
    torch.mul(x2, cos, out=y2)
    y2.addcmul_(x1, sin)
    turned[..., width:] = t[..., width:]
    return turned.to(t.dtype)
