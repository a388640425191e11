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

from megatron.core.collectives import all_reduce
from megatron.core.utils import get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none

CHUNK_ELEMENTS = 1 << 20
"""Logits looked at in one go on a CPU: few enough to stay in its cache from one pass to the next."""


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


def calculate_cross_entropy_loss(exp_logits: Tensor, predicted_logits_sum_exp_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, loss of each token) from what `calculate_predicted_logits` gave; changes `exp_logits`
    in place."""
    predicted, sums = (x.view(exp_logits.shape[:-1]) for x in predicted_logits_sum_exp_logits.chunk(2))
    loss = sums.log() - predicted
    return exp_logits.div_(sums.unsqueeze(-1)), loss


def calculate_gradients(softmax: Tensor, grad_output: Tensor, target_mask: Tensor, masked_target_1d: Tensor) -> Tensor:
    """Gradient of the logits, (probabilities - one-hot target) * grad_output; changes `softmax` in place."""
    flat = softmax.view(-1, softmax.size(-1))
    own = (~target_mask).flatten().to(softmax.dtype)
    flat.scatter_add_(-1, masked_target_1d.unsqueeze(-1), -own.unsqueeze(-1))
    return softmax.mul_(grad_output.unsqueeze(-1))


class FusedVocabParallelCrossEntropy(torch.autograd.Function):
    """Forward turns the logits into probabilities, backward turns these into the gradient, all in one memory.

    Forward all-reduces once a maximum, once two sums for each token; backward communicates nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: ProcessGroup | None, vocab_size: int | None) -> Tensor:
        width = logits.size(-1)
        first = get_pg_rank(group) * width
        valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
        rows, local_target = logits.view(-1, width), target.reshape(-1) - first
        elsewhere = (local_target < 0) | (local_target >= valid)
        local_target = local_target.masked_fill(elsewhere, 0)
        predicted = rows[_tokens(rows), local_target].float()
        local_log_sum = _softmax_in_place(rows, valid)
        log_sum, loss = combine_over_group(local_log_sum, predicted.masked_fill(elsewhere, 0.0), group)
        # exact even where the stored probability is rounded: for sure predictions 1 - p is what matters
        target_probability = (predicted - log_sum).exp_()
        ctx.save_for_backward(logits, local_target, elsewhere, target_probability, (local_log_sum - log_sum).exp_())
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, local_target, elsewhere, target_probability, share = ctx.saved_tensors
        rows, scale = logits.view(-1, logits.size(-1)), grad_output.reshape(-1)
        # The factor has the logits' type: a mixed product would be computed by a slow path.
        factor = (scale * share).to(rows.dtype).unsqueeze(-1)
        token = _tokens(rows)
        target_grad = ((target_probability - 1.0) * scale).to(rows.dtype)
        # Where the target is elsewhere, column 0 stands in for it and keeps its value.
        target_grad = torch.where(elsewhere, rows[token, local_target] * factor.squeeze(-1), target_grad)
        rows.mul_(factor)
        rows[token, local_target] = target_grad
        return logits, None, None, None


def _tokens(rows: Tensor) -> Tensor:
    """Numbers of the rows: with them single elements are read and written without a look at the others."""
    return torch.arange(rows.size(0), device=rows.device)


def _softmax_in_place(rows: Tensor, valid: int) -> Tensor:
    """Rows become their softmax over the first `valid` columns, zero beyond. Returns [n] fp32, logs of the sums."""
    rows[:, valid:] = -torch.inf
    log_sum = torch.full((rows.size(0),), -torch.inf, device=rows.device)
    if valid == 0:  # nothing but padding: no softmax to speak of
        rows.zero_()
        return log_sum
    wide = torch.empty(0, dtype=torch.float32, device=rows.device)
    for part in row_chunks(rows):
        chunk = rows[part]
        values = chunk if chunk.dtype == torch.float32 else wide.resize_(chunk.shape).copy_(chunk)
        highest = values.amax(dim=-1)
        torch.softmax(values, dim=-1, out=values)
        # The largest probability is exp(largest logit - log_sum), and never close to zero.
        log_sum[part] = highest - values.amax(dim=-1).log_()
        if values is not chunk:
            chunk.copy_(values)
    return log_sum


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that fit a CPU's cache; on other devices all rows at once."""
    step = max(1, CHUNK_ELEMENTS // rows.size(-1)) if rows.device.type == "cpu" else rows.size(0)
    for start in range(0, rows.size(0), max(step, 1)):
        yield slice(start, start + step)


def combine_over_group(log_sum: Tensor, predicted: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials over the columns of all ranks, and the loss."""
    if get_pg_size(group) > 1:
        highest = log_sum.clone()
        all_reduce(highest, dist.ReduceOp.MAX, group=group)
        both = torch.stack(((log_sum - highest).exp_(), predicted))
        all_reduce(both, group=group)
        log_sum, predicted = both[0].log().add_(highest), both[1]
    return log_sum, log_sum - predicted


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Loss of each token. The logits are overwritten: nothing else may need their values.

    Args:
        vocab_parallel_logits: [s, b, v/tp] contiguous, any float type; the softmax runs in fp32.
        target: [s, b], ids in the full vocabulary.
        vocab_size: true size of the vocabulary; columns beyond it are padding. None: there is no padding.

    Returns:
        [s, b] fp32, in nats; equal on every rank of the group.
    """
    group = get_tensor_model_parallel_group_if_none(tp_group)
    return FusedVocabParallelCrossEntropy.apply(vocab_parallel_logits.contiguous(), target, group, vocab_size)
