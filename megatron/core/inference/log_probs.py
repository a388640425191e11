"""What is told of tokens: their log-probabilities and those of the most likely ones. w positions, v vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Told:
    """Of one position."""

    token: int
    log_prob: float
    """Of the token, before any filter; nan where nobody asked."""
    best: list[tuple[int, float]]
    """(token, log-probability) of the most likely ones, best first."""


def rows_told(tokens: Tensor, logits: Tensor, num_best: int, wants_log_probs: bool) -> Tensor:
    """[w, 2 + 2 num_best] fp64: token, its log-probability, the most likely tokens, their log-probabilities.

    Args:
        tokens: [w] int64; below 0 they stand for something else than words, which has no probability.
        logits: [w, v].
    """
    rows = torch.full((len(tokens), 2 + 2 * num_best), torch.nan, dtype=torch.float64)
    rows[:, 0] = tokens
    if wants_log_probs or num_best:
        log_probs = logits.float().log_softmax(-1)
        rows[:, 1] = log_probs.gather(1, tokens.clamp(min=0).to(logits.device)[:, None])[:, 0]
        rows[tokens < 0, 1] = torch.nan
        if num_best:
            values, best = log_probs.topk(min(num_best, log_probs.size(1)))
            rows[:, 2 : 2 + best.size(1)] = best
            rows[:, 2 + num_best : 2 + num_best + best.size(1)] = values
    return rows


def told(row: Tensor, num_best: int, limit: int) -> Told:
    """A row of `rows_told`, with at most `limit` of the most likely tokens."""
    values = row.tolist()
    best = zip(values[2 : 2 + num_best], values[2 + num_best :])
    return Told(int(values[0]), values[1], [(int(token), value) for token, value in best if token == token][:limit])
