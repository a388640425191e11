"""y_e = x_e W_eᵀ for the rows of each expert e, with gradients that go straight into where they accumulate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron.core.tensor_parallel.gemm import LinearProducts, add_product, matmul_into


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, splits: list[int], fused_accumulation: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.splits, ctx.fused_accumulation = weight, splits, fused_accumulation
        return _products(x, weight.transpose(1, 2), splits)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        dx = _products(grad_output, weight, ctx.splits) if ctx.needs_input_grad[0] else None
        dw = _weight_gradients(ctx.weight, grad_output, x, ctx) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _LinearOfEach(torch.autograd.Function):
    """One group after the other, each with products of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, splits: list[int], accumulate: bool, products: Sequence[LinearProducts]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.splits, ctx.accumulate, ctx.products = weight, splits, accumulate, products
        y = x.new_empty(x.size(0), weight.size(1))
        for own, rows, matrix, part in zip(products, x.split(splits), weight, y.split(splits)):
            part.copy_(own.output(rows, matrix, None))
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        accumulated = getattr(ctx.weight, "main_grad", None)
        fused = ctx.accumulate and accumulated is not None
        total = torch.zeros_like(weight) if accumulated is None or not fused else accumulated.view(weight.shape)
        dx = torch.empty_like(x)
        split = zip(
            ctx.products, grad_output.split(ctx.splits), x.split(ctx.splits), weight, total, dx.split(ctx.splits)
        )
        for own, dy, rows, matrix, part, part_of_dx in split:
            gradient = own.gradient(dy)
            if ctx.needs_input_grad[0]:
                part_of_dx.copy_(own.input_gradient(gradient, matrix))
            if ctx.needs_input_grad[1]:
                of_matrix = _Accumulator(part)
                own.weight_gradient(of_matrix, gradient, rows, accumulate=True)
        return dx, None if fused or not ctx.needs_input_grad[1] else total, None, None, None


class _Accumulator:
    """Stands for one matrix of a stack: where its gradient is added."""

    def __init__(self, main_grad: Tensor) -> None:
        self.main_grad = main_grad


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    splits: list[int],
    gradient_accumulation_fusion: bool = False,
    products: Sequence[LinearProducts] | None = None,
) -> Tensor:
    """[m, out].

    Args:
        x: [m, in], the rows of the first expert, then of the second, and so on.
        weight: [E, out, in].
        splits: rows of each expert, some may be 0.
        gradient_accumulation_fusion: add the gradient of `weight` to `weight.main_grad`.
        products: how to multiply the matrix of each; None for all together, in their own type.
    """
    if products is not None:
        return _LinearOfEach.apply(x, weight, splits, gradient_accumulation_fusion, products)
    return _GroupedLinear.apply(x, weight, splits, gradient_accumulation_fusion)


def _products(x: Tensor, matrices: Tensor, splits: list[int]) -> Tensor:
    """x_e M_e, `matrices` [E, in, out]."""
    if grouped_kernel_works(x.device.type, x.dtype):
        offsets = torch.tensor(splits, device=x.device).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x, matrices, offs=offsets)
    y = x.new_empty(x.size(0), matrices.size(2))
    for rows, part, matrix in zip(x.split(splits), y.split(splits), matrices):
        if len(rows):
            matmul_into(part, rows, matrix)
    return y


def _weight_gradients(weight: Tensor, grad_output: Tensor, x: Tensor, ctx: Any) -> Tensor | None:
    total = getattr(weight, "main_grad", None)
    if ctx.fused_accumulation and total is not None:
        for dy, rows, part in zip(grad_output.split(ctx.splits), x.split(ctx.splits), total.view(weight.shape)):
            if len(rows):
                add_product(part, dy.t(), rows)
        return None
    gradients = torch.empty_like(weight)
    for dy, rows, part in zip(grad_output.split(ctx.splits), x.split(ctx.splits), gradients):
        if len(rows):
            matmul_into(part, dy.t(), rows)
        else:
            part.zero_()
    return gradients


@cache
def grouped_kernel_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies all groups in one kernel; tried once (CUDA, bf16, torch 2.8)."""
    if device_type != "cuda" or dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    try:
        x = torch.ones(16, 16, dtype=dtype, device=device_type)
        matrices = torch.ones(2, 16, 16, dtype=dtype, device=device_type)
        y = torch._grouped_mm(x, matrices, offs=torch.tensor([8, 16], device=device_type, dtype=torch.int32))
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((y == 16).all())
