"""The matrix products under the parallel layers, with their gradients written out so that communication overlaps with
computation and weight gradients go straight into the accumulation buffer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import InFlight, all_reduce, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron.core.tensor_parallel.gemm import PLAIN_PRODUCTS, LinearProducts, linear, matmul
from megatron.core.tensor_parallel.mappings import _gather_first_dim, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.stored_weight import StoredWeight
from megatron.core.tensor_parallel.weight_grad_queue import PostponedProduct, WeightGradQueue, postpone
from megatron.core.utils import get_pg_size, get_tensor_model_parallel_group_if_none


class LinearWithGradAccumulationAndAsyncCommunication(torch.autograd.Function):
    """x Wᵀ + b; forward may all-gather x, backward all-reduces or reduce-scatters dx while it computes dW."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fused_accumulation: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: ProcessGroup | None,
        weight_grad_queue: WeightGradQueue | None = None,
        products: LinearProducts = PLAIN_PRODUCTS,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.queue, ctx.products = weight_grad_queue, products
        ctx.weight = weight  # the parameter object itself, which carries `main_grad`
        ctx.has_bias, ctx.fused_accumulation = bias is not None, fused_accumulation
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.group = allreduce_dgrad, sequence_parallel, group
        full = _gather_first_dim(x, group) if sequence_parallel else x
        return products.output(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        if needs_dw:
            gather_from = ctx.group if ctx.sequence_parallel else None
            product = PostponedProduct(ctx.weight, grad_output, x, gather_from, ctx.fused_accumulation, ctx.products)
            needs_dw = not postpone(product, ctx.queue)
        # x was not stored whole: it is fetched while dx is being computed, which is exchanged while dW is.
        whole_x = start_all_gather(x, ctx.group) if ctx.sequence_parallel and needs_dw else InFlight(x, None)
        dx, dy = InFlight(grad_output, None), ctx.products.gradient(grad_output)
        if needs_dx:
            dx = _start_exchange(ctx.products.input_gradient(dy, weight), ctx)
        dw = db = None
        if needs_dw:
            dw = ctx.products.weight_gradient(ctx.weight, dy, whole_x.wait(), ctx.fused_accumulation)
        if ctx.has_bias and needs_db:
            db = grad_output.reshape(-1, grad_output.size(-1)).sum(0)
        return dx.wait() if needs_dx else None, dw, db, None, None, None, None, None, None


def _start_exchange(dx: Tensor, ctx: Any) -> InFlight:
    if ctx.allreduce_dgrad:
        return start_all_reduce(dx, ctx.group)
    return start_reduce_scatter(dx, ctx.group) if ctx.sequence_parallel else InFlight(dx, None)


def linear_with_grad_accumulation_and_async_allreduce(
    input: Tensor,
    weight: Tensor | StoredWeight,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    async_grad_allreduce: bool | None = None,
    tp_group: ProcessGroup | None = None,
    weight_grad_queue: WeightGradQueue | None = None,
    products: LinearProducts = PLAIN_PRODUCTS,
) -> Tensor:
    """x Wᵀ + b.

    Args:
        input: [s, b, in], or [s/tp, b, in] with `sequence_parallel`, then all-gathered first.
        weight: [out, in], this rank's shard; a stored one has no backward.
        gradient_accumulation_fusion: add dW to `weight.main_grad` instead of returning it.
        allreduce_dgrad: all-reduce dx over the group, overlapped with the computation of dW.
        sequence_parallel: all-gather x, reduce-scatter dx, overlapped likewise.
        weight_grad_queue: backward leaves the product dW here as long as there is room.
        products: how to multiply.

    Raises:
        NotImplementedError: `grad_output_buffer` is given, in whose place there is `weight_grad_queue`.
    """
    if grad_output_buffer is not None:
        raise NotImplementedError("grad_output_buffer: give a weight_grad_queue, which holds the inputs too")
    if async_grad_allreduce is not None:
        allreduce_dgrad = async_grad_allreduce
    if allreduce_dgrad and sequence_parallel:
        raise ValueError("allreduce_dgrad and sequence_parallel exclude each other: dx is reduce-scattered instead")
    group = get_tensor_model_parallel_group_if_none(tp_group)
    many = get_pg_size(group) > 1
    if not torch.is_grad_enabled():
        whole = gather_from_sequence_parallel_region(input, group=group) if sequence_parallel and many else input
        if isinstance(weight, StoredWeight):
            return linear(whole, weight, bias)
        return products.output(whole, weight, bias)
    if isinstance(weight, StoredWeight):
        raise RuntimeError("a stored weight has no backward: run the model under torch.no_grad()")
    return LinearWithGradAccumulationAndAsyncCommunication.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        allreduce_dgrad and many,
        sequence_parallel and many,
        group,
        weight_grad_queue,
        products,
    )


class LinearWithFrozenWeight(torch.autograd.Function):
    """x Wᵀ + b without a gradient for W; backward all-reduces dx on request."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.allreduce_dgrad, ctx.group = allreduce_dgrad, group
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dgrad = matmul(grad_output, weight)
        if ctx.allreduce_dgrad:
            all_reduce(dgrad, group=ctx.group)
        return dgrad, None, None, None, None


def linear_with_frozen_weight(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: ProcessGroup | None,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: None = None,
    async_grad_allreduce: bool | None = None,
) -> Tensor:
    """As `linear_with_grad_accumulation_and_async_allreduce` for a weight that is not trained."""
    group = get_tensor_model_parallel_group_if_none(tp_group)
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
    reduce = allreduce_dgrad and not sequence_parallel and get_pg_size(group) > 1
    return LinearWithFrozenWeight.apply(input, weight, bias, reduce, group)


class _EmbeddingLookup(torch.autograd.Function):
    """Rows of W; backward adds to the rows that were looked up, straight into `main_grad` where there is one."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first: int, fused_accumulation: bool, sharded: bool) -> Tensor:
        local = ids
        outside = None
        if sharded:
            local = ids - first
            outside = (local < 0) | (local >= weight.size(0))
            local = local.masked_fill(outside, 0)
        ctx.save_for_backward(local, *(() if outside is None else (outside,)))
        ctx.weight, ctx.fused_accumulation = weight, fused_accumulation
        rows = F.embedding(local, weight)
        return rows if outside is None else rows.masked_fill_(outside.unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, *outside = ctx.saved_tensors
        if outside:
            grad = grad.masked_fill(outside[0].unsqueeze(-1), 0)
        flat = grad.reshape(-1, grad.size(-1))
        main_grad = getattr(ctx.weight, "main_grad", None)
        if ctx.fused_accumulation and main_grad is not None:
            main_grad.index_add_(0, local.reshape(-1), flat.to(main_grad.dtype))
            return None, None, None, None, None
        # fp32: a bf16 sum over many occurrences of one token loses them
        wgrad = torch.zeros(ctx.weight.shape, dtype=torch.float32, device=flat.device)
        wgrad.index_add_(0, local.reshape(-1), flat.float())
        return None, wgrad.to(ctx.weight.dtype), None, None, None


def embedding_lookup(
    ids: Tensor, weight: Tensor, first: int, gradient_accumulation_fusion: bool, sharded: bool
) -> Tensor:
    """Rows of `weight` for `ids`; zeros for ids outside `[first, first + len(weight))` if the table is `sharded`."""
    return _EmbeddingLookup.apply(ids, weight, first, gradient_accumulation_fusion, sharded)
