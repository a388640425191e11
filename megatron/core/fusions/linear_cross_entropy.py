"""Output layer and cross entropy in one, over a sharded vocabulary, without ever holding the logits of all tokens
(Shoeybi et al., arXiv:1909.08053, section 3; pieces: Wijmans et al., arXiv:2411.09009, section 4).

Tokens pass in pieces: their logits are made, looked at and dropped; backward makes them again and turns them into the
gradients of hidden states and weight. That costs one more product of the output layer. s sequence, b microbatch, h
hidden, v vocabulary, n = s * b tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.fusions.fused_cross_entropy import combine_over_group
from megatron.core.tensor_parallel.gemm import linear, matmul, weight_gradient
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_tensor_model_parallel_group_if_none

PIECE_ELEMENTS = {"cpu": 1 << 23}
"""Logits that exist at a time: some MiB on a CPU."""
PIECE_ELEMENTS_ELSEWHERE = 1 << 26
"""On other devices, whose products want many rows: 256 MiB in fp32."""


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
        local_target = local_target.masked_fill(elsewhere, 0)
        log_sum = torch.full(target.shape, -torch.inf, device=x.device)
        predicted = torch.zeros_like(log_sum)
        for part in pieces(x, width):
            logits = linear(x[part], weight)
            predicted[part] = logits.gather(-1, local_target[part].unsqueeze(-1)).squeeze(-1).float()
            if valid:
                log_sum[part] = torch.logsumexp(logits[:, :valid].float(), dim=-1)
        log_sum, loss = combine_over_group(log_sum, predicted.masked_fill_(elsewhere, 0.0), group)
        ctx.save_for_backward(x, weight, local_target, elsewhere, log_sum)
        ctx.weight, ctx.valid, ctx.accumulate = weight, valid, accumulate
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, local_target, elsewhere, log_sum = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_dx else None
        total = _Total(ctx.weight, ctx.accumulate) if needs_dw else None
        for part in pieces(x, weight.size(0)):
            logits = linear(x[part], weight).float()
            gradient = logits.sub_(log_sum[part].unsqueeze(-1)).exp_()
            gradient[:, ctx.valid :] = 0.0
            own = elsewhere[part].logical_not().to(gradient.dtype)
            gradient.scatter_add_(-1, local_target[part].unsqueeze(-1), -own.unsqueeze(-1))
            dlogits = gradient.mul_(grad_output[part].unsqueeze(-1)).to(x.dtype)
            if dx is not None:
                dx[part] = matmul(dlogits, weight)
            if total is not None:
                total.add(dlogits, x[part])
        return dx, None if total is None else total.gradient(), None, None, None, None


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

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        weight_gradient(self, dlogits, x, accumulate=True)  # type: ignore[arg-type]  # which looks at `main_grad` only

    def gradient(self) -> Tensor | None:
        return None if self.fused else self.main_grad.to(self.weight.dtype)


def pieces(x: Tensor, width: int) -> Iterator[slice]:
    """Slices of the tokens of x [n, h] whose logits [., width] exist at a time."""
    elements = PIECE_ELEMENTS.get(x.device.type, PIECE_ELEMENTS_ELSEWHERE)
    step = max(1, elements // width)
    for start in range(0, x.size(0), step):
        yield slice(start, start + step)


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
