"""Which experts a token is sent to, and with which weights. n tokens, E experts, k experts per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Scores are computed in fp32, or in fp64 where the router is."""
    return x if x.dtype == torch.float64 else x.float()


def choose_experts(
    logits: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights [n, E], zero where not chosen; chosen [n, E] bool) of the k best experts of each token.

    Softmax (arXiv:1701.06538, section 2.1): over the k chosen logits, or with `pre_softmax` over all E before.
    Sigmoid (arXiv:2412.19437, section 2.1.2): of each logit, normalised over the chosen ones for k > 1.

    Args:
        logits: [n, E].
        num_groups: choose within `group_topk` of so many groups of experts, see `group_limited_topk`.
        scaling_factor: on all weights.
        expert_bias: [E], added to the scores for the choice, not in the weights (arXiv:2408.15664).
    """

    def best(scores: Tensor) -> tuple[Tensor, Tensor]:
        if group_topk is None:
            return torch.topk(scores, topk, dim=1)
        assert num_groups is not None
        return group_limited_topk(scores, topk, len(scores), scores.size(1), num_groups, group_topk)

    if score_function == "softmax":
        if pre_softmax:
            weights, indices = best(torch.softmax(wide(logits), dim=-1))
        else:
            chosen, indices = best(wide(logits))
            weights = torch.softmax(chosen, dim=-1)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(wide(logits))
        indices = best(scores if expert_bias is None else scores + expert_bias)[1]
        weights = scores.gather(1, indices)
        if topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    else:
        raise ValueError(f"score function {score_function!r}: softmax and sigmoid are known")
    if scaling_factor is not None:
        weights = weights * scaling_factor
    return spread(weights, indices, logits.size(1))


def spread(weights: Tensor, indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[n, k] weights at `indices` as ([n, E] weights, [n, E] bool)."""
    empty = weights.new_zeros(len(weights), num_experts)
    return empty.scatter(1, indices, weights), empty.bool().scatter(1, indices, True)


def group_limited_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """The k best scores of each token, and their experts, from the `group_topk` best groups of neighbouring experts.

    A group is as good as the sum of its k // group_topk best scores (arXiv:2405.04434, section 2.1.3, and
    arXiv:2412.19437, section 2.1.2), so that experts of few devices see a token.
    """
    groups = scores.view(num_tokens, num_groups, num_experts // num_groups)
    worth = groups.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(group_topk, dim=-1).indices, True)
    return groups.masked_fill(~kept.unsqueeze(-1), -math.inf).view_as(scores).topk(topk, dim=-1)


def expert_capacity(num_tokens: int, topk: int, num_experts: int, factor: float) -> int:
    """Tokens of this rank that one expert takes, C = ceil(n k / E * factor), at most all of them."""
    return min(math.ceil(num_tokens * topk / num_experts * factor), num_tokens)


def limit_to_capacity(
    weights: Tensor, chosen: Tensor, capacity: int, drop_policy: str = "probs", pad: bool = False
) -> tuple[Tensor, Tensor]:
    """(weights, chosen) with at most `capacity` tokens of this rank for each expert.

    Args:
        weights, chosen: [n, E].
        drop_policy: "probs" keeps the tokens with the largest weights, "position" the first ones.
        pad: fill up with tokens of weight 0, so that each expert gets exactly `capacity`.
    """
    if drop_policy == "probs":
        order = weights.detach().masked_fill(~chosen, -1.0).argsort(dim=0, descending=True, stable=True)
        place = order.argsort(dim=0)
    elif drop_policy == "position":
        place = chosen.cumsum(0) - 1
    else:
        raise ValueError(f"drop policy {drop_policy!r}: probs and position are known")
    kept = chosen & (place < capacity)
    weights = weights * kept
    if pad:
        gap = capacity - kept.sum(0)
        kept = kept | (~kept & ((~kept).cumsum(0) <= gap))
    return weights, kept
