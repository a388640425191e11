"""Causal attention on a CPU by blocks of queries, each against the keys it sees: batched matrix products and no s x s
matrix (after FlashAttention, arXiv:2205.14135; a block has all its keys at once, so no running softmax is needed).

s sequence, b microbatch, a heads, g query groups, d head width, n = b * a.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries in a block: enough for the matrix products, few enough to skip most keys that come later."""

SHORTEST, LONGEST = 256, 512
"""Lengths at which this is faster than torch's kernel. That one takes keys 512 at a time, so up to there it
computes the whole square: of its time this needs 75 % in bf16 and 80 % in fp32 (512, AVX-512). Beyond, it
skips later keys too."""


class BlockedCausalAttention(torch.autograd.Function):
    """Keeps queries, keys, values and the result; backward computes the probabilities again.

    Scores, and the gradients of probabilities, are fp32 products; probabilities enter further products in the
    type of v.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        b, a, s, d = q.shape
        keys, values = _heads(k, a), _heads(v, a)
        wide_queries, wide_keys = _heads(q, a).float() * scale, keys.float()
        out = torch.empty(s, b * a, d, dtype=q.dtype)  # [s, b, a, d] in memory, as the caller wants it
        for start, stop in _blocks(s):
            probs = _probabilities(wide_queries, wide_keys, start, stop)
            out[start:stop] = torch.bmm(probs.to(v.dtype), values[:, :stop]).transpose(0, 1)
        out = out.view(s, b, a, d).permute(1, 2, 0, 3)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        b, a, s, d = q.shape
        queries, keys, grad = _heads(q, a), _heads(k, a), _heads(grad_output, a)
        wide_queries, wide_keys = queries.float() * ctx.scale, keys.float()
        wide_grad, wide_values = grad.float(), _heads(v, a).float()
        # dS = P (dP - rowsum(dO O)), the gradient of a softmax, without the sum over P dP
        minus_mean = (wide_grad * _heads(out, a)).sum(-1, keepdim=True).neg_()
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = torch.zeros(2, b * a, s, d).unbind(0)  # fp32: sums over many blocks
        for start, stop in _blocks(s):
            probs = _probabilities(wide_queries, wide_keys, start, stop)
            grad_scores = torch.baddbmm(
                minus_mean[:, start:stop], wide_grad[:, start:stop], wide_values[:, :stop].transpose(1, 2)
            )
            grad_v[:, :stop] += torch.bmm(probs.to(v.dtype).transpose(1, 2), grad[:, start:stop])
            half = grad_scores.mul_(probs).mul_(ctx.scale).to(q.dtype)
            grad_q[:, start:stop] = torch.bmm(half, keys[:, :stop])
            grad_k[:, :stop] += torch.bmm(half.transpose(1, 2), queries[:, start:stop])
        return grad_q.view(q.shape), _summed_over_groups(grad_k, k), _summed_over_groups(grad_v, v), None


def _blocks(s: int) -> Iterator[tuple[int, int]]:
    for start in range(0, s, BLOCK):
        yield start, min(start + BLOCK, s)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, a or g, s, d] -> [b * a, s, d] contiguous: keys and values are repeated for the heads that share them."""
    return x.repeat_interleave(num_heads // x.size(1), dim=1).contiguous().flatten(0, 1)


def _summed_over_groups(grad: Tensor, like: Tensor) -> Tensor:
    """[b * a, s, d] -> [b, g, s, d], the gradient of what was repeated."""
    b, g, s, d = like.shape
    return grad.view(b, g, -1, s, d).sum(2).to(like.dtype)


def _probabilities(queries: Tensor, keys: Tensor, start: int, stop: int) -> Tensor:
    """[n, stop - start, stop] fp32 of the queries start, ..., stop - 1, which see nothing from stop on."""
    scores = torch.bmm(queries[:, start:stop], keys[:, :stop].transpose(1, 2))
    size = stop - start
    scores[:, :, start:] += torch.full((size, size), -torch.inf).triu_(1)
    return torch.softmax(scores, dim=-1)


def suits_blocks(q: Tensor, v: Tensor) -> bool:
    """Whether blocks are the faster way for queries and values [b, a, s, d]."""
    has_fast_products = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
    return has_fast_products and SHORTEST <= q.size(-2) <= LONGEST and q.size(-1) == v.size(-1)


def blocked_causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v in which a query sees no later key; CPU tensors.

    Args:
        q: [b, a, s, d].
        k: [b, g, s, d].
        v: like `k`.

    Returns:
        [b, a, s, d], in memory [s, b, a, d].
    """
    return BlockedCausalAttention.apply(q, k, v, scale)
