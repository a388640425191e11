"""What spreads tokens evenly over experts: losses on the router, and balanced assignments.

T tokens of a micro-batch on all ranks that share it (tensor × context parallel), of which this rank has n; E experts, k
experts per token. Losses are this rank's part of a sum over those ranks, so that the sum of their gradients is that of
one process.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_reduce
from megatron.core.transformer.moe.routing import spread, wide
from megatron.core.utils import get_pg_size

LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Balancing losses, and their names in the log where there are several."""


class RealTokens:
    """Which of the n = s × b rows of this rank are tokens, and how many all ranks have that share them.

    Args:
        padding_mask: [s, b], True where there is none; None: all are tokens.
        shape: (s, b).
        group: the ranks that share a micro-batch.
    """

    def __init__(self, padding_mask: Tensor | None, shape: torch.Size, group: ProcessGroup | None) -> None:
        if padding_mask is not None and padding_mask.shape != shape:
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}, hidden states have {tuple(shape)}")
        self.shape, self.group = shape, group
        self.real = None if padding_mask is None else ~padding_mask.reshape(-1)

    def of(self, values: Tensor) -> Tensor:
        """`values` [n, E], zero where there is no token."""
        return values if self.real is None else values * self.real.unsqueeze(1)

    @cached_property
    def number(self) -> int | Tensor:
        """Of all ranks, at least 1."""
        if self.real is None:
            return self.shape.numel() * get_pg_size(self.group)
        return self._of_all_ranks(self.real.sum()).clamp(min=1)

    @cached_property
    def number_in_sequences(self) -> int | Tensor:
        """In each sequence [b], or in all of them alike."""
        if self.real is None:
            return self.shape[0] * get_pg_size(self.group)
        return self._of_all_ranks(self.real.view(self.shape).sum(0)).clamp(min=1)

    def _of_all_ranks(self, number: Tensor) -> Tensor:
        if get_pg_size(self.group) > 1:
            all_reduce(number, group=self.group, what="tokens that are not padding")
        return number


def balancing_losses(config: Any) -> dict[str, float]:
    """Balancing loss -> its coefficient, in the order of `moe_router_load_balancing_type`; without those of zero."""
    kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else kinds
    coeffs = coeffs if isinstance(coeffs, list) else [coeffs]
    return {kind: coeff for kind, coeff in zip(kinds, coeffs) if kind in LOSSES and coeff}


def names_of_balancing_losses(config: Any) -> dict[str, str]:
    """Balancing loss -> its name in the log: a loss that stands alone is `load_balancing_loss`, whichever it is."""
    kinds = balancing_losses(config)
    alone = len(kinds) == 1 and "global_aux_loss" not in kinds
    return {kind: "load_balancing_loss" if alone else LOSSES[kind] for kind in kinds}


def scores_of_all_experts(logits: Tensor, topk: int, score_function: str) -> tuple[Tensor, Tensor]:
    """(scores [n, E] that sum to 1 for each token, its k best experts [n, E] bool): what a balancing loss looks at."""
    if score_function == "softmax":
        scores = torch.softmax(wide(logits), dim=-1)
    else:
        scores = torch.sigmoid(wide(logits))
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    values, indices = scores.topk(topk, dim=1)
    return scores, spread(values, indices, logits.size(1))[1]


def switch_load_balancing_loss(
    scores: Tensor, tokens_per_expert: Tensor, total_tokens: int | Tensor, topk: int
) -> Tensor:
    """E / (T² k) Σ_e P_e n_e, the loss of arXiv:2101.03961, section 2.2, for k experts per token; 1 when even.

    Args:
        scores: [n, E] of this rank's tokens.
        tokens_per_expert: [E], n_e, of all T tokens.
    """
    num_experts = scores.size(1)
    return (scores.sum(0) * tokens_per_expert).sum() * num_experts / (total_tokens**2 * topk)


def sequence_load_balancing_loss(
    scores: Tensor, tokens_per_expert: Tensor, sequence_length: int | Tensor, topk: int
) -> Tensor:
    """The same for each sequence on its own, averaged over the b sequences (arXiv:2405.04434, section 2.1.3).

    Args:
        scores: [n/b, b, E] of this rank's tokens.
        tokens_per_expert: [b, E] of all tokens of each sequence.
        sequence_length: tokens of one sequence on all ranks; [b] where they differ.
    """
    batch, num_experts = scores.shape[1:]
    if isinstance(sequence_length, Tensor):
        of_sequences = (scores.sum(0) * tokens_per_expert).sum(1) / sequence_length**2
        return of_sequences.sum() * num_experts / (topk * batch)
    return (scores.sum(0) * tokens_per_expert).sum() * num_experts / (sequence_length**2 * topk * batch)


def router_z_loss(logits: Tensor, total_tokens: int | Tensor) -> Tensor:
    """1/T Σ (log Σ_e exp logit)², which keeps logits small (arXiv:2202.08906, section 3.1). `logits` [n, E]."""
    return torch.logsumexp(wide(logits), dim=-1).square().sum() / total_tokens


def sinkhorn(cost: Tensor, tol: float = 1e-4) -> Tensor:
    """exp(cost) [n, E] scaled to even rows and columns, alternately (arXiv:2202.01169, section 3.1.1)."""
    cost = torch.exp(cost)
    rows, columns = cost.new_ones(cost.size(0)), cost.new_ones(cost.size(1))
    eps, error, before = 1e-8, float("inf"), columns
    while error > tol:
        rows = 1 / (cost.size(0) * ((columns * cost).sum(1) + eps))
        columns = 1 / (cost.size(1) * ((rows.unsqueeze(1) * cost).sum(0) + eps))
        error = float((before - columns).abs().mean())
        before = columns
    return columns * cost * rows.unsqueeze(1)
