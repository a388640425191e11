"""Attention of this rank's queries to keys and values that are gathered from all ranks first (Dubey et al.,
arXiv:2407.21783, section 3.3.2).

n tokens of this rank, s of the whole sample, b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_into_tensor, reduce_scatter_tensor
from megatron.core.transformer.context_parallel.block_kernels import accumulation_type
from megatron.core.transformer.context_parallel.ring import KEY_GRADIENTS, KEYS, empty_results
from megatron.core.transformer.context_parallel.task import AttentionTask
from megatron.core.transformer.context_parallel.token_order import inverse, order_of_tokens, reordered
from megatron.core.utils import get_pg_size


def _whole(x: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
    """[n, b, g, d] -> [s, b, g, d], in the order of the sample."""
    size = get_pg_size(group)
    if size == 1:
        return x
    gathered = x.new_empty(size * x.size(0), *x.shape[1:])
    all_gather_into_tensor(gathered, x.contiguous(), group=group, what=KEYS)
    return reordered(gathered, order_of_tokens(task.layout, tuple(range(size)), x.device))


def _own_sum(grad: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
    """[s, b, g, d] -> [n, b, g, d], summed over the ranks."""
    size = get_pg_size(group)
    if size == 1:
        return grad
    order = order_of_tokens(task.layout, tuple(range(size)), grad.device)
    by_rank = reordered(grad, inverse(order)).contiguous()
    own = grad.new_empty(grad.size(0) // size, *grad.shape[1:])
    reduce_scatter_tensor(own, by_rank, group=group, what=KEY_GRADIENTS)
    return own


class GatheredAttention(torch.autograd.Function):
    """Forward all-gathers keys and values; backward gathers them again and reduce-scatters their gradients, which are
    sums of accumulation type."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
        out, lse = empty_results(q)
        ctx.saved = task.forward(q, _whole(k, task, group), _whole(v, task, group), None, out, lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.task, ctx.group = task, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        task, group = ctx.task, ctx.group
        dq = torch.zeros(q.shape, dtype=accumulation_type(q.dtype), device=q.device)
        keys, values = _whole(k, task, group), _whole(v, task, group)
        dk, dv = task.backward(grad, q, keys, values, None, out, lse, ctx.saved, dq)
        own_k, own_v = _own_sum(dk, task, group), _own_sum(dv, task, group)
        return dq.to(q.dtype), own_k.to(k.dtype), own_v.to(v.dtype), None, None


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
    """[n, b, a, d] of queries [n, b, a, d], keys and values [n, b, g, d].

    Communicates, over `group`: forward and backward all-gather keys and values; backward reduce-scatters their
    gradients.
    """
    return GatheredAttention.apply(q, k, v, task, group)
