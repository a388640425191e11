"""a bᵀ of two quantized matrices, a [m, k] and b [n, k].

On CUDA the matrix units multiply fp8 where torch has a kernel for the kind of scales; each is tried once against the
plain product. Everywhere else values are restored to fp32, multiplied and summed there, and rounded once: the same
numbers but for the order of the sum.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fp8.quantization import Quantized, quantize_blocks, quantize_tensor
from megatron.core.fp8.recipes import Block

_ALIGNMENT = 16
"""k and n of the kernels are multiples of it; zeros fill up."""

Order = Literal["by kind", "by side"]
ORDERS: tuple[Order, ...] = ("by kind", "by side")
"""Which scales of blocks are handed over transposed: those of square blocks, or those of the right factor. torch's
checks on the meta device say the former; versions may differ."""


def scaled_product(
    a: Quantized, b: Quantized, out_dtype: torch.dtype, bias: Tensor | None = None, exact_sums: bool = True
) -> Tensor:
    """a bᵀ + bias, [m, n], rounded once to `out_dtype`; a kernel's product is rounded before the bias is added.

    Args:
        bias: [n].
        exact_sums: keep partial sums in fp32; without, the kernel for one scale a tensor may keep fewer bits, which is
            faster.
    """
    kinds = a.data.dtype, b.data.dtype, a.block, b.block
    order = _order_that_works(a.data.device.type, *kinds, out_dtype) if a.data.numel() else None
    if order is not None:
        product = _by_kernel(a, b, out_dtype, exact_sums, order)
        return product if bias is None else product + bias
    return plain_product(a, b, out_dtype, bias)


def plain_product(a: Quantized, b: Quantized, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """As `scaled_product`, by a product of fp32; on CUDA of bf16, which scales that are powers of two leave exact."""
    x, y = a.dequantized(), b.dequantized()
    if x.is_cuda and a.power_of_two and b.power_of_two and out_dtype != torch.float32:
        product = x.bfloat16().matmul(y.bfloat16().t())
    else:
        product = x.matmul(y.t())
    return (product if bias is None else product + bias.to(product.dtype)).to(out_dtype)


def _by_kernel(a: Quantized, b: Quantized, out_dtype: torch.dtype, exact_sums: bool, order: Order) -> Tensor:
    m, n = a.data.size(0), b.data.size(0)
    if a.block is None:
        left, right = _filled_up(a.data, 1, _ALIGNMENT), _filled_up(b.data, _ALIGNMENT, _ALIGNMENT)
        product = torch._scaled_mm(
            left, right.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=out_dtype, use_fast_accum=not exact_sums
        )
    else:
        (left, left_scale), (right, right_scale) = _for_blocks(a), _for_blocks(b)
        transposed = [_is_square(a), _is_square(b)] if order == "by kind" else [False, True]
        scales = [scale.t() if turn else scale for scale, turn in zip((left_scale, right_scale), transposed)]
        product = F.scaled_mm(  # torch 2.10
            left,
            right.t(),
            scales[0],
            _kind(a.block),
            scales[1],
            _kind(b.block),
            output_dtype=out_dtype,
        )
    return product[:m, :n] if product.shape != (m, n) else product


def _filled_up(data: Tensor, rows: int, columns: int) -> Tensor:
    """Row-major, with zeros behind rows and columns up to multiples of these."""
    beside, below = -data.size(1) % columns, -data.size(0) % rows
    if not beside and not below:
        return data.contiguous()
    kind = torch.uint8 if data.dtype.itemsize == 1 else data.dtype
    return F.pad(data.view(kind), (0, beside, 0, below)).view(data.dtype)


def _for_blocks(x: Quantized) -> tuple[Tensor, Tensor]:
    """Values in whole blocks, and their scales as the kernel reads them: of single rows, rows run fastest; of square
    blocks, blocks of k do, filled up to a multiple of 4."""
    assert x.block is not None
    if _is_square(x):
        return _filled_up(x.data, x.block[0], x.block[1]), _filled_up(x.scale, 1, 4)
    return _filled_up(x.data, _ALIGNMENT, x.block[1]), _filled_up(x.scale, _ALIGNMENT, 1).t().contiguous().t()


def _is_square(x: Quantized) -> bool:
    return x.block is not None and x.block[0] == x.block[1]


def _kind(block: Block | None) -> Any:
    """How torch calls the scales of such blocks."""
    return getattr(F.ScalingType, "BlockWise{}x{}".format(*block or ()))


def has_kernel(
    device_type: str, a_type: torch.dtype, b_type: torch.dtype, a: Block | None, b: Block | None, out_dtype: torch.dtype
) -> bool:
    """Whether such a device multiplies values of these types in these blocks itself."""
    return _order_that_works(device_type, a_type, b_type, a, b, out_dtype) is not None


@cache
def _order_that_works(
    device_type: str, a_type: torch.dtype, b_type: torch.dtype, a: Block | None, b: Block | None, out_dtype: torch.dtype
) -> Order | None:
    """How this machine takes scales, if it multiplies such operands itself, and rightly; tried once."""
    known = {None, (1, 128), (128, 128)}  # blocks of 32 take scales in an order of their own, and another generation
    if device_type != "cuda" or not {a, b} <= known or (a is not None and not hasattr(F, "scaled_mm")):
        return None
    generator = torch.Generator(device_type).manual_seed(0)
    x, y = (torch.randn(size, 600, device=device_type, generator=generator) for size in (200, 264))
    left, right = _quantized(x, a_type, a), _quantized(y, b_type, b)
    expected = plain_product(left, right, torch.float32)
    for order in ORDERS[: 1 if a is None else None]:
        with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            found = _by_kernel(left, right, out_dtype, True, order).float()
            if (found - expected).norm() < 0.01 * expected.norm():
                return order
    return None


def _quantized(x: Tensor, dtype: torch.dtype, block: Block | None) -> Quantized:
    if block is not None:
        return quantize_blocks(x, dtype, block, power_of_two=True)
    return quantize_tensor(x, dtype, torch.tensor(0.01, device=x.device))
