"""Attention on a CPU by blocks of queries, each against the keys it sees: batched matrix products and no s x s
matrix, with dropout neither (after FlashAttention, arXiv:2205.14135; a block has all its keys at once, so no running
softmax is needed).

s sequence, b microbatch, a heads, g query groups, d head width, n = b * a.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries in a block: enough for the matrix products, few enough to skip most keys that come later."""

SHORTEST, LONGEST = 256, 512
"""Lengths at which this is faster than torch's kernel. That one takes keys 512 at a time, so up to there it
computes the whole square: of its time this needs 75 % in bf16 and 80 % in fp32 (512, AVX-512). Beyond, it
skips later keys too."""


@dataclass(frozen=True)
class Rules:
    """What attention is besides queries, keys and values."""

    scale: float
    is_causal: bool = True
    """A query sees no later key; there are as many keys as queries."""
    hidden: Tensor | None = None
    """[b or 1, a or 1, sq or 1, sk] bool, True where a key is hidden; a query that sees none gets 0."""
    dropout_p: float = 0.0
    dropout_seed: int = 0

    def blocks(self, q: Tensor, k: Tensor) -> Iterator[Block]:
        """The blocks of queries [b, a, sq, d] with their keys [b, g, sk, d], the same in every call."""
        b, a, s, _ = q.shape
        generator = torch.Generator().manual_seed(self.dropout_seed) if self.dropout_p > 0.0 else None
        for start in range(0, s, BLOCK):
            stop = min(start + BLOCK, s)
            seen = stop if self.is_causal else k.size(2)
            keep = None if generator is None else _kept((b * a, stop - start, seen), self.dropout_p, generator)
            yield Block(start, stop, seen, keep)


@dataclass(frozen=True)
class Block:
    """Queries start, ..., stop - 1, which see keys before `seen`."""

    start: int
    stop: int
    seen: int
    keep: Tensor | None
    """[n, stop - start, seen], what dropout multiplies probabilities with."""

    def probabilities(self, queries: Tensor, keys: Tensor, rules: Rules, shape: torch.Size) -> Tensor:
        """[n, stop - start, seen] fp32, before dropout; queries and keys [n, s, d], `shape` that of q."""
        scores = torch.bmm(queries[:, self.start : self.stop], keys[:, : self.seen].transpose(1, 2))
        if rules.is_causal:
            size = self.stop - self.start
            scores[:, :, self.start :] += torch.full((size, size), -torch.inf).triu_(1)
        if rules.hidden is None:
            return torch.softmax(scores, dim=-1)
        hidden = rules.hidden if rules.hidden.size(2) == 1 else rules.hidden[:, :, self.start : self.stop]
        by_head = scores.view(shape[0], shape[1], -1, self.seen)
        by_head.masked_fill_(hidden[..., : self.seen], -torch.inf)
        probs = torch.softmax(scores, dim=-1)
        probs.view_as(by_head).masked_fill_(hidden[..., : self.seen].all(-1, keepdim=True), 0.0)
        return probs

    def dropped(self, probs: Tensor) -> Tensor:
        """What is left of them."""
        return probs if self.keep is None else probs * self.keep


class BlockedAttention(torch.autograd.Function):
    """Keeps queries, keys, values and the result; backward computes the probabilities again, and draws again what
    dropout leaves.

    Scores, and the gradients of probabilities, are fp32 products; probabilities enter further products in the
    type of v.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        b, a, s, d = q.shape
        keys, values = _heads(k, a), _heads(v, a)
        wide_queries, wide_keys = _heads(q, a).float() * rules.scale, keys.float()
        out = torch.empty(s, b * a, d, dtype=q.dtype)  # [s, b, a, d] in memory, as the caller wants it
        for block in rules.blocks(q, k):
            probs = block.dropped(block.probabilities(wide_queries, wide_keys, rules, q.shape))
            out[block.start : block.stop] = torch.bmm(probs.to(v.dtype), values[:, : block.seen]).transpose(0, 1)
        out = out.view(s, b, a, d).permute(1, 2, 0, 3)
        ctx.save_for_backward(q, k, v, out)
        ctx.rules = rules
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        rules, a = ctx.rules, q.size(1)
        queries, keys, grad = _heads(q, a), _heads(k, a), _heads(grad_output, a)
        wide_queries, wide_keys = queries.float() * rules.scale, keys.float()
        wide_grad, wide_values = grad.float(), _heads(v, a).float()
        # dS = P (dP - rowsum(dO O)), the gradient of a softmax, without the sum over P dP
        minus_mean = (wide_grad * _heads(out, a)).sum(-1, keepdim=True).neg_()
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = torch.zeros(2, *keys.shape).unbind(0)  # fp32: sums over many blocks
        for block in rules.blocks(q, k):
            rows, seen = slice(block.start, block.stop), slice(block.seen)
            probs = block.probabilities(wide_queries, wide_keys, rules, q.shape)
            if block.keep is None:
                grad_scores = torch.baddbmm(
                    minus_mean[:, rows], wide_grad[:, rows], wide_values[:, seen].transpose(1, 2)
                )
            else:
                grad_scores = torch.bmm(wide_grad[:, rows], wide_values[:, seen].transpose(1, 2))
                grad_scores.mul_(block.keep).add_(minus_mean[:, rows])
            grad_v[:, seen] += torch.bmm(block.dropped(probs).to(v.dtype).transpose(1, 2), grad[:, rows])
            half = grad_scores.mul_(probs).mul_(rules.scale).to(q.dtype)
            grad_q[:, rows] = torch.bmm(half, keys[:, seen])
            grad_k[:, seen] += torch.bmm(half.transpose(1, 2), queries[:, rows])
        return grad_q.view(q.shape), _summed_over_groups(grad_k, k), _summed_over_groups(grad_v, v), None


def _kept(shape: tuple[int, int, int], probability: float, generator: torch.Generator) -> Tensor:
    """fp32: 0 with this probability, to a 16th bit, else the factor that leaves the mean as it is.

    A fourth of the numbers that torch's dropout draws: each has 64 random bits.
    """
    count, limit = shape[0] * shape[1] * shape[2], round(probability * 2**16)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[:count].view(shape) >= limit - 2**15
    return kept.to(torch.float32).mul_(2**16 / (2**16 - limit))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, a or g, s, d] -> [b * a, s, d] contiguous: keys and values are repeated for the heads that share them."""
    return x.repeat_interleave(num_heads // x.size(1), dim=1).contiguous().flatten(0, 1)


def _summed_over_groups(grad: Tensor, like: Tensor) -> Tensor:
    """[b * a, s, d] -> [b, g, s, d], the gradient of what was repeated."""
    b, g, s, d = like.shape
    return grad.view(b, g, -1, s, d).sum(2).to(like.dtype)


def computes_here(q: Tensor, v: Tensor) -> bool:
    """Whether blocks can be used for queries and values [b, a, s, d]."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.size(-1) == v.size(-1)


def suits_blocks(q: Tensor, v: Tensor) -> bool:
    """Whether blocks are the faster way for causal attention without dropout of queries and values [b, a, s, d]."""
    return computes_here(q, v) and SHORTEST <= q.size(-2) <= LONGEST


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """dropout(softmax(scale q kᵀ)) v; CPU tensors.

    Args:
        q: [b, a, sq, d].
        k: [b, g, sk, d].
        v: like `k`.

    Returns:
        [b, a, sq, d], in memory [sq, b, a, d].
    """
    return BlockedAttention.apply(q, k, v, rules)
