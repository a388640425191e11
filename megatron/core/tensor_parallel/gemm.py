"""The matrix products of a linear layer: y = x Wᵀ + b, dx = dy W, and dW = dyᵀ x straight into where it accumulates."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.device import to_computing_type
from megatron.core.tensor_parallel.stored_weight import StoredWeight


def linear(x: Tensor, weight: Tensor | StoredWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in the type of x, computed in whatever type is fast."""
    if isinstance(weight, StoredWeight):
        return weight.multiply(x, bias)
    wide = to_computing_type(x)
    if suits_onednn(x, weight):
        return by_onednn(x, weight, bias)
    if wide is x and bias is not None and not torch.is_grad_enabled():
        # torch's own is a view of a matrix, which nobody may overwrite once an autograd function has returned it.
        y = x.new_empty(*x.shape[:-1], weight.size(0))
        torch.addmm(bias, x.reshape(-1, x.size(-1)), weight.t(), out=y.view(-1, y.size(-1)))
        return y
    if wide is x:
        return F.linear(x, weight, bias)
    return F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in the type of a, computed in whatever type is fast."""
    if b.dim() == 2 and suits_onednn(a, b.t()):
        return by_onednn(a, b.t())
    wide = to_computing_type(a)
    return a.matmul(b) if wide is a else wide.matmul(b.float()).to(a.dtype)


SMALLEST_FOR_ONEDNN = 128
"""Rows, columns and length of the sums from which oneDNN takes less time."""


def suits_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN makes a bᵀ of a [..., k] and b [n, k]: fp32 on a CPU with AVX-512, and nothing to differentiate.

    torch gives fp32 products to MKL, which takes a tenth more time for the shapes of a layer on processors of AMD
    (docs/performance.md).
    """
    if a.dtype is not torch.float32 or a.device.type != "cpu" or b.dtype is not a.dtype or torch.is_grad_enabled():
        return False
    k = a.size(-1)
    return min(a.numel() // max(k, 1), b.size(0), k) >= SMALLEST_FOR_ONEDNN and ONEDNN_MULTIPLIES


def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias, fp32: a [..., k], b [n, k], bias [n]."""
    if b.size(1) > _LONGEST_STRIDED:
        b = b.contiguous()
    product = torch.ops.mkldnn._linear_pointwise(a.reshape(-1, a.size(-1)), b, bias, "none", [], "")
    # No view of it, which nobody may overwrite once an autograd function has returned it.
    return torch.ops.aten._unsafe_view(product, (*a.shape[:-1], b.size(0)))


_LONGEST_STRIDED = 2**14
"""Length of sums beyond which oneDNN reads a transposed matrix slower than a copy is made (50304: by a tenth)."""


ONEDNN_MULTIPLIES = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether torch has oneDNN's product of dense matrices, and the processor what it was measured with."""


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a b`, where `out` is a contiguous [..., n] and `b` a matrix [m, n]."""
    if to_computing_type(a) is a:
        torch.mm(a.reshape(-1, a.size(-1)), b, out=out.view(-1, out.size(-1)))
    else:
        out.copy_(matmul(a, b))


def weight_gradient(weight: Tensor, grad_output: Tensor, x: Tensor, accumulate: bool) -> Tensor | None:
    """dyᵀ x, summed over all dimensions but the last.

    With `accumulate` it is added to `weight.main_grad`, where there is one, and None is returned: autograd then has
    nothing to add, and a gradient that reaches the same parameter on another way (tied weights) still counts. The
    parameter's post-accumulate hook runs all the same, once all its users have had their turn.

    Args:
        grad_output: dy [..., out].
        x: what the weight was multiplied with, [..., in].
    """
    dy, x = grad_output.reshape(-1, grad_output.size(-1)), x.reshape(-1, x.size(-1))
    total = getattr(weight, "main_grad", None)
    if not accumulate or total is None:
        return matmul(dy.t(), x)
    add_product(total, dy.t(), x)
    return None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b`; a product of half precision is rounded once before it is added to an fp32 total.

    In one type it is one kernel. In mixed types it is one kernel on CUDA where torch has it; elsewhere the
    product is made and added in pieces of rows, so that a small part of it exists at a time.
    """
    a, b = to_computing_type(a), to_computing_type(b)
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif mixed_kernel_works(a.device.type, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, _PIECE // total.size(1))
        for part, factor in zip(total.split(rows), a.split(rows)):
            part.add_(factor.matmul(b))


_PIECE = 2**22
"""Elements of a product that exist at a time: 8 MiB of bf16, of which a CPU's last cache keeps much."""


@cache
def mixed_kernel_works(device_type: str, dtype: torch.dtype, total_dtype: torch.dtype) -> bool:
    """Whether torch multiplies `dtype` into a total of `total_dtype` in one kernel; tried once (CUDA, torch 2.8)."""
    if device_type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    try:
        total = torch.ones(16, 16, dtype=total_dtype, device=device_type)
        a = torch.ones(16, 16, dtype=dtype, device=device_type)
        torch.addmm(total, a, a, out_dtype=total_dtype, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((total == 17).all())


class LinearProducts:
    """The three products of a linear layer, in the type of its operands; a layer may have others (`core.fp8`)."""

    def for_evaluation(self) -> LinearProducts:
        """The same, without anything being learned from the operands."""
        return self

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps, equal on all ranks that share the weight; None for nothing."""
        return None

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` left off; there is nothing to it here."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b in the type of x."""
        return linear(x, weight, bias)

    def gradient(self, grad_output: Tensor) -> Any:
        """dy as the two following products take it; what it costs to prepare is paid once for both."""
        return grad_output

    def input_gradient(self, gradient: Any, weight: Tensor) -> Tensor:
        """dy W in the type of dy."""
        return matmul(gradient, weight)

    def weight_gradient(self, weight: Tensor, gradient: Any, x: Tensor, accumulate: bool) -> Tensor | None:
        """dyᵀ x; see the function of this name."""
        return weight_gradient(weight, gradient, x, accumulate)


PLAIN_PRODUCTS = LinearProducts()
