"""Cross entropy over a vocabulary that is sharded over the tensor parallel group (Shoeybi et al., arXiv:1909.08053,
section 3).

s sequence, b microbatch, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_reduce
from megatron.core.utils import get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Forward all-reduces three numbers per token (maximum, sum of exponentials, target logit); backward none.

    The log-probabilities are stored once and turned into the gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vocab_parallel_logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        group: ProcessGroup | None = None,
        vocab_size: int | None = None,
    ) -> Tensor:
        width = vocab_parallel_logits.size(-1)
        first = get_pg_rank(group) * width
        valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
        log_probs = torch.log_softmax(vocab_parallel_logits[..., :valid], dim=-1, dtype=torch.float32)
        if get_pg_size(group) > 1:
            _normalise_over_group(log_probs, vocab_parallel_logits, group)
        local_target = target - first
        owned = (local_target >= 0) & (local_target < valid)
        local_target = torch.where(owned, local_target, 0).unsqueeze(-1)
        if valid:
            loss = torch.where(owned, -log_probs.gather(-1, local_target).squeeze(-1), 0.0)
        else:
            loss = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
        loss = _sum_over_group(loss, group)
        total = vocab_size if vocab_size is not None else width * get_pg_size(group)
        if label_smoothing > 0:
            smoothing = label_smoothing * total / (total - 1)
            mean_log_prob = _sum_over_group(log_probs.sum(-1), group) / total
            loss = (1 - smoothing) * loss - smoothing * mean_log_prob
        ctx.smoothing = (label_smoothing * total / (total - 1), total) if label_smoothing > 0 else (0.0, total)
        ctx.dtype, ctx.padding = vocab_parallel_logits.dtype, width - valid
        ctx.save_for_backward(log_probs, local_target, owned)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        log_probs, local_target, owned = ctx.saved_tensors
        smoothing, total = ctx.smoothing
        grad = log_probs.exp_()  # the stored tensor becomes the gradient: backward runs once
        if smoothing:
            grad.sub_(smoothing / total)
        if grad.size(-1):
            grad.scatter_add_(-1, local_target, owned.unsqueeze(-1) * torch.tensor(smoothing - 1.0, device=grad.device))
        grad.mul_(grad_output.unsqueeze(-1))
        if ctx.padding:
            grad = torch.nn.functional.pad(grad, (0, ctx.padding))
        return grad.to(ctx.dtype), None, None, None, None


def _normalise_over_group(log_probs: Tensor, logits: Tensor, group: ProcessGroup | None) -> None:
    """Turn log-probabilities over this rank's columns into those over all columns, in place."""
    if log_probs.size(-1):
        log_sum = logits[..., 0].float() - log_probs[..., 0]
    else:  # nothing but padding here
        log_sum = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    highest = log_sum.clone()
    all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total = (log_sum - highest).exp_()
    all_reduce(total, group=group)
    log_probs.sub_((highest + total.log_() - log_sum).unsqueeze(-1))


def _sum_over_group(x: Tensor, group: ProcessGroup | None) -> Tensor:
    if get_pg_size(group) > 1:
        all_reduce(x, group=group)
    return x


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Loss of each token, computed without gathering the logits.

    Args:
        vocab_parallel_logits: [s, b, v/tp], any float type; the softmax runs in fp32.
        target: [s, b], ids in the full vocabulary.
        label_smoothing: share of the probability spread evenly over the other tokens.
        vocab_size: true size of the vocabulary; columns beyond it are padding, which takes no part in the
            softmax and gets no gradient. None: there is no padding.

    Returns:
        [s, b] fp32, in nats; equal on every rank of the group.

    Raises:
        ValueError: `target` is not [s, b].
    """
    if target.shape != vocab_parallel_logits.shape[:-1]:
        raise ValueError(
            f"target has shape {list(target.shape)}, expected {list(vocab_parallel_logits.shape[:-1])} of the logits"
        )
    group = get_tensor_model_parallel_group_if_none(tp_group)
    return VocabParallelCrossEntropy.apply(vocab_parallel_logits, target, label_smoothing, group, vocab_size)
