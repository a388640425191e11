"""Attention whose keys and values travel a ring of ranks while each computes with those it has (Liu et al.,
arXiv:2310.01889), and attention to keys and values gathered from all ranks (Dubey et al., arXiv:2407.21783, section
3.3.2).

n tokens of this rank, b microbatch, a heads, g query groups, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.activity import communicating, launched
from megatron.core.transformer.context_parallel.block_kernels import accumulation_type
from megatron.core.transformer.context_parallel.task import AttentionTask
from megatron.core.utils import get_pg_rank, get_pg_size

KEYS, KEY_GRADIENTS = "keys and values", "gradients of keys and values"


class _Hop:
    """Tensors on their way to the next rank, and those of the previous rank on their way here."""

    def __init__(self, tensors: Sequence[Tensor], group: ProcessGroup | None, what: str) -> None:
        assert group is not None
        rank, size = group.rank(), group.size()
        self.group, self.what, self.source = group, what, (rank - 1) % size
        self.shapes = [t.shape for t in tensors]
        self.outgoing = torch.cat([t.reshape(-1) for t in tensors])  # one message; kept until it has left
        self.incoming = torch.empty_like(self.outgoing)
        self.landed = launched("exchange", group, self.source, of=what)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.outgoing, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self.incoming, group=group, group_peer=self.source),
            ]
        )

    def arrived(self) -> list[Tensor]:
        """What the previous rank sent."""
        with communicating("exchange", self.group, peer=self.source, of=self.what):
            for work in self.works:
                work.wait()
        self.landed()
        parts = self.incoming.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]


class RingAttention(torch.autograd.Function):
    """Forward passes keys and values once around the ring; backward passes them again, with their gradients.

    Each hop is under way while the block before it is computed. Gradients of keys and values travel as sums of
    accumulation type and come back to the rank that holds the tokens.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
        out, lse = empty_results(q)
        size, rank = get_pg_size(group), get_pg_rank(group)
        ctx.saved = []
        here: list[Tensor] = [k, v]
        for step in range(size):
            hop = _Hop(here, group, KEYS) if step < size - 1 else None
            ctx.saved.append(task.forward(q, here[0], here[1], (rank - step) % size, out, lse))
            if hop is not None:
                here = hop.arrived()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.task, ctx.group = task, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        task, group = ctx.task, ctx.group
        size, rank = get_pg_size(group), get_pg_rank(group)
        dq = torch.zeros(q.shape, dtype=accumulation_type(q.dtype), device=q.device)
        here: list[Tensor] = [k, v]
        sums: _Hop | None = None
        for step in range(size):
            hop = _Hop(here, group, KEYS) if step < size - 1 else None
            grads = task.backward(grad, q, here[0], here[1], (rank - step) % size, out, lse, ctx.saved[step], dq)
            if sums is not None:  # what earlier ranks found for these keys has come behind them
                for total, part in zip(grads, sums.arrived()):
                    total += part
            if size > 1:
                sums = _Hop(grads, group, KEY_GRADIENTS)
            if hop is not None:
                here = hop.arrived()
        dk, dv = sums.arrived() if sums is not None else grads
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of no keys."""
    n, b, a, _ = q.shape
    dtype = accumulation_type(q.dtype)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    return out, torch.full((b, a, n), -torch.inf, dtype=dtype, device=q.device)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, task: AttentionTask, group: ProcessGroup | None) -> Tensor:
    """[n, b, a, d] of queries [n, b, a, d], keys and values [n, b, g, d].

    Communicates, over `group`: forward n·b·g·2d elements (cp - 1) times to the next rank; backward the same, and their
    gradients of accumulation type cp times.
    """
    return RingAttention.apply(q, k, v, task, group)
