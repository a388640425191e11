"""Output layer and cross entropy in one, over a sharded vocabulary, without ever holding the logits of all tokens
(Shoeybi et al., arXiv:1909.08053, section 3; pieces: Wijmans et al., arXiv:2411.09009, section 4).

The vocabulary passes in pieces: their logits are made, looked at and dropped; backward makes them again and turns them
into the gradients of hidden states and weight, of which each row gets its own at once. That costs one more product of
the output layer. s sequence, b microbatch, h hidden, v vocabulary, n = s * b tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.fusions.fused_cross_entropy import combine_over_group
from megatron.core.tensor_parallel.gemm import add_product, linear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_tensor_model_parallel_group_if_none

PIECE_ELEMENTS = {"cpu": 1 << 21}
"""Logits that exist at a time: on a CPU so few that they stay in its cache from one pass to the next."""
PIECE_ELEMENTS_ELSEWHERE = 1 << 26
"""On other devices, whose products want more: 256 MiB in fp32."""
MOST_TOKENS = 1 << 12
"""In a piece: more of them would leave it too few columns."""


class LinearCrossEntropy(torch.autograd.Function):
    """Loss of each token [n] fp32 of hidden states [n, h] and this rank's rows of the weight [v/tp, h].

    Forward all-reduces once a maximum, once two sums for each token; backward communicates nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        group: ProcessGroup | None,
        vocab_size: int | None,
        accumulate: bool,
    ) -> Tensor:
        width = weight.size(0)
        first = get_pg_rank(group) * width
        valid = width if vocab_size is None else min(max(vocab_size - first, 0), width)
        local_target = target - first
        elsewhere = (local_target < 0) | (local_target >= valid)
        local_target = local_target.masked_fill_(elsewhere, -1)
        log_sum = torch.full(target.shape, -torch.inf, device=x.device)
        predicted = torch.zeros_like(log_sum)
        for tokens in token_blocks(x):
            for columns in pieces(x[tokens], valid):
                logits = linear(x[tokens], weight[columns])
                own, column = _targets_in(columns, local_target[tokens])
                predicted[tokens][own] = logits[own, column].float()
                log_sum[tokens] = torch.logaddexp(log_sum[tokens], torch.logsumexp(logits.float(), dim=-1))
        log_sum, loss = combine_over_group(log_sum, predicted, group)
        ctx.save_for_backward(x, weight, local_target, log_sum)
        ctx.weight, ctx.valid, ctx.accumulate = weight, valid, accumulate
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, local_target, log_sum = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_dx else None
        total = _Total(ctx.weight, ctx.accumulate) if needs_dw else None
        for tokens in token_blocks(x):
            rows = x[tokens]
            # fp32: a bf16 sum over many pieces loses some
            block_dx = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
            for columns in pieces(rows, ctx.valid):
                gradient = linear(rows, weight[columns]).float().sub_(log_sum[tokens].unsqueeze(-1)).exp_()
                gradient[_targets_in(columns, local_target[tokens])] -= 1.0
                dlogits = gradient.mul_(grad_output[tokens].unsqueeze(-1)).to(x.dtype)
                if dx is not None:
                    add_product(block_dx, dlogits, weight[columns])
                if total is not None:
                    add_product(total.main_grad[columns], dlogits.t(), rows)
            if dx is not None:
                dx[tokens] = block_dx
        return dx, None if total is None else total.gradient(), None, None, None, None


def _targets_in(columns: slice, target: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens whose target is one of these columns, and which of them it is."""
    own = ((target >= columns.start) & (target < columns.stop)).nonzero().squeeze(-1)
    return own, target[own] - columns.start


class _Total:
    """Sum of the weight's gradients of all pieces: in `main_grad` where there is one, else in fp32."""

    def __init__(self, weight: Tensor, accumulate: bool) -> None:
        self.weight = weight
        self.fused = accumulate and getattr(weight, "main_grad", None) is not None
        self.main_grad = (
            weight.main_grad  # type: ignore[attr-defined]
            if self.fused
            else torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        )

    def gradient(self) -> Tensor | None:
        return None if self.fused else self.main_grad.to(self.weight.dtype)


def token_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of x [n, h] that are looked at together."""
    for start in range(0, x.size(0), MOST_TOKENS):
        yield slice(start, start + MOST_TOKENS)


def pieces(x: Tensor, width: int) -> Iterator[slice]:
    """Slices of so many columns whose logits exist at a time for the tokens x [n, h]."""
    elements = PIECE_ELEMENTS.get(x.device.type, PIECE_ELEMENTS_ELSEWHERE)
    step = max(1, elements // max(x.size(0), 1))
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """Loss of each token, as `vocab_parallel_cross_entropy` of `hidden_states @ weight.t()`.

    Communicates: beside the loss what a column-parallel layer does, the sum of the hidden states' gradients over the
    group; with `sequence_parallel` all-gather and reduce-scatter.

    Args:
        hidden_states: [s, b, h], with `sequence_parallel` [s/tp, b, h].
        weight: [v/tp, h], this rank's part of the vocabulary.
        target: [s, b], ids in the full vocabulary.
        vocab_size: true size of the vocabulary; rows beyond it are padding. None: there is no padding.
        gradient_accumulation_fusion: add the weight's gradient to `weight.main_grad`.

    Returns:
        [s, b] fp32, in nats; equal on every rank of the group.
    """
    group = get_tensor_model_parallel_group_if_none(tp_group)
    if sequence_parallel:
        whole = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
    else:
        whole = copy_to_tensor_model_parallel_region(hidden_states, group)
    rows = whole.reshape(-1, whole.size(-1))
    loss = LinearCrossEntropy.apply(rows, weight, target.reshape(-1), group, vocab_size, gradient_accumulation_fusion)
    return loss.view(target.shape)
