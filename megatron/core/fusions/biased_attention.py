"""Attention with a learned bias on the scores, on a CPU: as few passes over the s x s matrices as batched products
leave (relative positions of T5, arXiv:1910.10683, section 2.1).

torch's kernels compute no gradient of a bias, so that it falls back to single operations, each of which writes such a
matrix of its own.

sq and sk queries and keys, b microbatch, a heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BiasedAttention(torch.autograd.Function):
    """softmax(scale q kᵀ + bias) v; see `biased_attention`. Keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        b, a, sq, _ = q.shape
        queries, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        probs = torch.bmm(queries if scale == 1.0 else queries * scale, keys.transpose(1, 2))
        by_head = probs.view(b, a, sq, -1)
        by_head.add_(bias)
        if hidden is not None:
            by_head.masked_fill_(hidden, -torch.inf)
        torch.softmax(probs, -1, out=probs)
        if hidden is not None:
            by_head.masked_fill_(hidden.all(-1, keepdim=True), 0.0)  # 0 / 0 where a query sees no key
        out = torch.bmm(probs, values)
        ctx.save_for_backward(queries, keys, values, probs, out)
        ctx.scale, ctx.bias_type = scale, bias.dtype
        return out.view(b, a, sq, -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, probs, out = ctx.saved_tensors
        b, a, sq, _ = grad_output.shape
        grad = grad_output.flatten(0, 1)
        # dS = P (dP - rowsum(dO O)), the gradient of a softmax, without the sum over P dP
        minus_mean = (grad * out).sum(-1, keepdim=True).neg_()
        grad_v = torch.bmm(probs.transpose(1, 2), grad)
        grad_scores = torch.baddbmm(minus_mean, grad, values.transpose(1, 2)).mul_(probs)
        grad_bias = grad_scores.view(b, a, sq, -1).sum(0, keepdim=True).to(ctx.bias_type)
        grad_q, grad_k = torch.bmm(grad_scores, keys), torch.bmm(grad_scores.transpose(1, 2), queries)
        if ctx.scale != 1.0:
            grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale)
        grads = (x.view(b, a, -1, x.size(-1)) for x in (grad_q, grad_k, grad_v))
        return *grads, grad_bias, None, None


def computes_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether `biased_attention` takes these tensors."""
    alike = q.shape[:2] == k.shape[:2] and q.dtype == k.dtype == v.dtype == torch.float32 and q.device.type == "cpu"
    return alike and bias.shape == (1, q.size(1), q.size(2), k.size(2))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q kᵀ + bias) v, [b, a, sq, d] fp32.

    Args:
        q: [b, a, sq, d]; k, v: [b, a, sk, d]; fp32 on the CPU.
        bias: [1, a, sq, sk].
        hidden: bool, True where a key is hidden, broadcasts to [b, a, sq, sk]; a query that sees none gets 0.
    """
    result: Tensor = BiasedAttention.apply(q, k, v, bias, hidden, scale)
    return result
