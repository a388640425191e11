"""a bᵀ of two quantized matrices, a [m, k] and b [n, k].

On CUDA the matrix units multiply fp8 where torch has a kernel for the kind of scales; each is tried once against the
plain product. Everywhere else values are restored to fp32, multiplied and summed there, and rounded once: the same
numbers but for the order of the sum.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fp8.quantization import Quantized, quantize_blocks, quantize_tensor
from megatron.core.fp8.recipes import Block

_ALIGNMENT = 16
"""k and n of the kernels are multiples of it; zeros fill up."""


def scaled_product(
    a: Quantized, b: Quantized, out_dtype: torch.dtype, bias: Tensor | None = None, exact_sums: bool = True
) -> Tensor:
    """a bᵀ + bias, [m, n], rounded once to `out_dtype`; a kernel's product is rounded before the bias is added.

    Args:
        bias: [n].
        exact_sums: keep partial sums in fp32; without, the kernel may keep fewer bits, which is faster.
    """
    if a.data.numel() and _kernel_works(a.data.device.type, a.data.dtype, b.data.dtype, a.block, b.block, out_dtype):
        product = _by_kernel(a, b, out_dtype, exact_sums)
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


def _by_kernel(a: Quantized, b: Quantized, out_dtype: torch.dtype, exact_sums: bool) -> Tensor:
    n = b.data.size(0)
    left, right = _aligned(a.data, rows=False), _aligned(b.data, rows=True).t()
    if a.block is None:
        product = torch._scaled_mm(
            left, right, scale_a=a.scale, scale_b=b.scale, out_dtype=out_dtype, use_fast_accum=not exact_sums
        )
    else:
        product = F.scaled_mm(  # torch 2.10
            left,
            right,
            _outer_dimension_major(a),
            _kind(a.block),
            _outer_dimension_major(b).t(),
            _kind(b.block),
            output_dtype=out_dtype,
            use_fast_accum=not exact_sums,
        )
    return product[:, :n] if product.size(1) != n else product


def _aligned(data: Tensor, rows: bool) -> Tensor:
    """Row-major, with zeros behind the columns (and rows) up to a multiple of 16."""
    beside, below = -data.size(1) % _ALIGNMENT, -data.size(0) % _ALIGNMENT if rows else 0
    if not beside and not below:
        return data.contiguous()
    return F.pad(data.view(torch.uint8), (0, beside, 0, below)).view(data.dtype)


def _outer_dimension_major(x: Quantized) -> Tensor:
    """Scales [blocks of rows, blocks of k] in the order in which the kernel reads them: rows run fastest for single
    rows, else blocks of k."""
    assert x.block is not None
    return x.scale.t().contiguous().t() if x.block[0] == 1 else x.scale.contiguous()


def _kind(block: Block | None) -> Any:
    """How torch calls the scales of such blocks."""
    return getattr(F.ScalingType, "BlockWise{}x{}".format(*block or ()))


@cache
def _kernel_works(
    device_type: str, a_type: torch.dtype, b_type: torch.dtype, a: Block | None, b: Block | None, out_dtype: torch.dtype
) -> bool:
    """Whether this machine multiplies such operands itself, and rightly; tried once."""
    known = {None, (1, 128), (128, 128)}  # blocks of 32 take scales in an order of their own, and another generation
    if device_type != "cuda" or not {a, b} <= known or (a is not None and not hasattr(F, "scaled_mm")):
        return False
    generator = torch.Generator(device_type).manual_seed(0)
    x, y = (torch.randn(size, 512, device=device_type, generator=generator) for size in (384, 256))
    try:
        left, right = _quantized(x, a_type, a), _quantized(y, b_type, b)
        found = _by_kernel(left, right, out_dtype, exact_sums=True).float()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return False
    expected = plain_product(left, right, torch.float32)
    return bool((found - expected).norm() < 0.01 * expected.norm())


def _quantized(x: Tensor, dtype: torch.dtype, block: Block | None) -> Quantized:
    if block is not None:
        return quantize_blocks(x, dtype, block, power_of_two=True)
    return quantize_tensor(x, dtype, torch.tensor(0.01, device=x.device))
