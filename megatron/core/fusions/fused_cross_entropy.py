"""Cross entropy over a sharded vocabulary with little memory traffic: no copy of the logits is made, and
their memory becomes the gradient's (Shoeybi et al., arXiv:1909.08053, section 3).

s sequence, b microbatch, v vocabulary, n = s * b tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.utils import get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none

CHUNK_ELEMENTS = 1 << 18
"""Logits looked at in one go on a CPU: small enough to stay in its cache from one pass to the next."""


def calculate_logits_max(vocab_parallel_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logits in fp32, maximum of each row)."""
    logits = vocab_parallel_logits.float()
    return logits, logits.amax(dim=-1)


def calculate_predicted_logits(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    logits_max: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(targets held elsewhere, local targets [n], [target logits ; sums of exponentials] [2n], exponentials).

    The first two of the third are still to be summed over the ranks. Changes the logits in place.
    """
    exp_logits = vocab_parallel_logits.sub_(logits_max.unsqueeze(-1))
    elsewhere = (target < vocab_start_index) | (target >= vocab_end_index)
    local_target = (target - vocab_start_index).masked_fill(elsewhere, 0)
    predicted = exp_logits.gather(-1, local_target.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
    sums = exp_logits.exp_().sum(dim=-1)
    return elsewhere, local_target.flatten(), torch.cat((predicted.flatten(), sums.flatten())), exp_logits


def calculate_cross_entropy_loss(
    exp_logits: Tensor, predicted_logits_sum_exp_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(probabilities, loss of each token) from what `calculate_predicted_logits` gave; changes `exp_logits`
    in place."""
    predicted, sums = (x.view(exp_logits.shape[:-1]) for x in predicted_logits_sum_exp_logits.chunk(2))
    loss = sums.log() - predicted
    return exp_logits.div_(sums.unsqueeze(-1)), loss


def calculate_gradients(
    softmax: Tensor, grad_output: Tensor, target_mask: Tensor, masked_target_1d: Tensor
) -> Tensor:
    """Gradient of the logits, (probabilities - one-hot target) * grad_output; changes `softmax` in place."""
    flat = softmax.view(-1, softmax.size(-1))
    own = (~target_mask).flatten().to(softmax.dtype)
    flat.scatter_add_(-1, masked_target_1d.unsqueeze(-1), -own.unsqueeze(-1))
    return softmax.mul_(grad_output.unsqueeze(-1))


class FusedVocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the logits as they are and one fp32 number for each token; backward overwrites the logits.

    Forward all-reduces once the maximum, once the sums of two numbers per token; backward communicates
    nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: ProcessGroup | None, vocab_size: int | None
    ) -> Tensor:
        width = logits.size(-1)
        first = get_pg_rank(group) * width
        valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
        rows, local_target = logits.view(-1, width), target.reshape(-1) - first
        elsewhere = (local_target < 0) | (local_target >= valid)
        local_target = local_target.masked_fill(elsewhere, 0)
        log_sum = torch.empty(rows.size(0), dtype=torch.float32, device=logits.device)
        for part in row_chunks(rows):
            torch.logsumexp(rows[part, :valid].float(), dim=-1, out=log_sum[part])
        predicted = (
            rows.gather(-1, local_target.unsqueeze(-1)).squeeze(-1).float().masked_fill_(elsewhere, 0.0)
        )
        log_sum, predicted = _combine_over_group(log_sum, predicted, group)
        ctx.save_for_backward(logits, log_sum, local_target, elsewhere)
        ctx.valid = valid
        return (log_sum - predicted).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sum, local_target, elsewhere = ctx.saved_tensors
        rows = logits.view(-1, logits.size(-1))
        scale = grad_output.reshape(-1, 1)
        for part in row_chunks(rows):
            # In fp32 these steps work on the logits themselves, in half precision on a small copy.
            grad = rows[part, : ctx.valid].float()
            grad.sub_(log_sum[part].unsqueeze(-1)).exp_().mul_(scale[part])
            rows[part, : ctx.valid] = grad
        own = torch.where(elsewhere.unsqueeze(-1), 0.0, scale)
        if ctx.valid:
            target_grad = rows.gather(-1, local_target.unsqueeze(-1)).float() - own
            rows.scatter_(-1, local_target.unsqueeze(-1), target_grad.to(rows.dtype))
        rows[:, ctx.valid :] = 0.0
        return logits, None, None, None


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that fit a CPU's cache; on other devices all rows at once."""
    step = max(1, CHUNK_ELEMENTS // rows.size(-1)) if rows.device.type == "cpu" else rows.size(0)
    for start in range(0, rows.size(0), max(step, 1)):
        yield slice(start, start + step)


def _combine_over_group(
    log_sum: Tensor, predicted: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials, and target logit, over the columns of all ranks."""
    if get_pg_size(group) == 1:
        return log_sum, predicted
    highest = log_sum.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    both = torch.stack(((log_sum - highest).exp_(), predicted))
    dist.all_reduce(both, group=group)
    return both[0].log().add_(highest), both[1]


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Loss of each token; backward overwrites the logits, so nothing else may need their values after it.

    Args:
        vocab_parallel_logits: [s, b, v/tp] contiguous, any float type; the softmax runs in fp32.
        target: [s, b], ids in the full vocabulary.
        vocab_size: true size of the vocabulary; columns beyond it are padding. None: there is no padding.

    Returns:
        [s, b] fp32, in nats; equal on every rank of the group.
    """
    group = get_tensor_model_parallel_group_if_none(tp_group)
    return FusedVocabParallelCrossEntropy.apply(vocab_parallel_logits.contiguous(), target, group, vocab_size)
