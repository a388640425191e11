"""Tensors as 8-bit floats with scales.

m rows, k columns; a block of [bm, bk] elements shares a scale, blocks at the border may be smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fp8.recipes import Block


@dataclass(frozen=True)
class Quantized:
    """`data` times `scale`, which stands for a matrix [m, k]."""

    data: Tensor
    """[m, k], e4m3 or e5m2."""
    scale: Tensor
    """fp32, [ceil(m/bm), ceil(k/bk)], or of no dimension for the whole tensor."""
    block: Block | None
    power_of_two: bool

    def dequantized(self) -> Tensor:
        """The values, fp32 [m, k]."""
        wide = widened(self.data)
        return wide.mul_(self.scale if self.block is None else spread(self.scale, self.block, self.data.shape))

    def transposed(self) -> Quantized:
        """[k, m]; only for a scale of the whole tensor or of square blocks."""
        block = self.block
        assert block is None or block[0] == block[1]
        return Quantized(self.data.t(), self.scale if block is None else self.scale.t(), block, self.power_of_two)


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| in fp32, of no dimension; 0 of no elements; not finite where an element is not."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return x.abs().amax().float()


def magnitudes_of_blocks(x: Tensor, block: Block) -> Tensor:
    """max |x| of each block, fp32 [ceil(m/bm), ceil(k/bk)]."""
    (m, k), (bm, bk) = x.shape, block
    padded = F.pad(x, (0, -k % bk, 0, -m % bm))
    return padded.view(padded.size(0) // bm, bm, padded.size(1) // bk, bk).abs().amax((1, 3)).float()


def scale_for(magnitude: Tensor, dtype: torch.dtype, power_of_two: bool = False, margin: int = 0) -> Tensor:
    """What an fp8 value is multiplied with, so that `magnitude` is the largest number that `dtype` has (2^margin times
    smaller); 1 where it is 0.

    What is not finite gives a scale that is not: the whole block becomes NaN, and is noticed.
    """
    scale = (magnitude / torch.finfo(dtype).max * 2.0**margin).clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        # Any bit of the mantissa carries into the exponent; what is not finite is left alone.
        rounded_up = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale.isfinite(), rounded_up, scale)
    return torch.where(magnitude == 0, torch.ones_like(scale), scale)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in fp8, rounded to nearest; numbers beyond the largest become that, infinity becomes NaN.

    Args:
        scale: broadcasts to x.
    """
    largest = torch.finfo(dtype).max
    divided = x.float() / scale
    bounded = divided.clamp(-largest, largest)
    return bounded.add_(divided.mul_(0.0)).to(dtype)  # 0 of a number, NaN of what is not finite


def widened(data: Tensor) -> Tensor:
    """fp8 in fp32. A CPU is several times faster at it by way of fp16, which has the bits of e5m2 and eight more, and
    those of e4m3, one further down: 2^8 times too small, but for NaN, which has to be put in."""
    if not data.is_cpu:
        return data.float()
    bits = data.view(torch.int8).to(torch.int16)
    if data.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).float()
    magnitude = bits & 0x7F
    is_nan = (magnitude + 1) >> 7
    half = (bits & -0x8000) | (magnitude << 7) | (is_nan * 0x7C00)
    return half.view(torch.float16).float().mul_(256)


def spread(scale: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """Scales of blocks as a scale for each element of `shape`."""
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def cast_blocks(x: Tensor, dtype: torch.dtype, block: Block, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """(`x` [m, k] in fp8, a scale for each block)."""
    scale = scale_for(magnitudes_of_blocks(x, block), dtype, power_of_two)
    return cast(x, spread(scale, block, x.shape), dtype), scale


Run = Callable[[Callable[..., Any]], Callable[..., Any]]
"""How a function of tensors is run: as it is, or compiled."""


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not compiled."""
    return function


def quantize_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor, run: Run = as_it_is) -> Quantized:
    """`x` [m, k] with one scale."""
    return Quantized(run(cast)(x, scale, dtype), scale, None, power_of_two=False)


def quantize_blocks(x: Tensor, dtype: torch.dtype, block: Block, power_of_two: bool, run: Run = as_it_is) -> Quantized:
    """`x` [m, k] with a scale for each block."""
    data, scale = run(cast_blocks)(x, dtype, block, power_of_two)
    return Quantized(data, scale, block, power_of_two)
