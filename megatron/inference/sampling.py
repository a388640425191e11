"""Choosing the next token from logits: greedy, temperature, top-k, nucleus. b rows, v vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn, and how many are."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it; 0 is greedy."""

    top_k: int = 0
    """Draw among the k most likely tokens only; 1 is greedy, 0 is no limit."""

    top_p: float = 0.0
    """Draw among the most likely tokens that together reach this probability; 0 is no limit."""

    num_tokens_to_generate: int = 30
    """Tokens after the prompt, at most; a continuation may end sooner, at an end-of-document token."""

    seed: int = 1234
    """Row i draws from its own generator, seeded with `seed + i`, whatever else is in the batch."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive, or 0 for greedy decoding")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be positive, or 0 for no limit")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be between 0 (no limit) and 1")
        if self.num_tokens_to_generate < 0:
            raise ValueError(f"num_tokens_to_generate ({self.num_tokens_to_generate}) must not be negative")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def row_generators(params: SamplingParams, num_rows: int) -> list[torch.Generator]:
    """One generator a row; on the CPU, so that a seed means the same text on every device."""
    return [torch.Generator().manual_seed(params.seed + row) for row in range(num_rows)]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """[b, v] with -inf wherever a logit is below the row's k-th largest."""
    if k == 0 or k >= logits.size(-1):
        return logits
    threshold = logits.topk(k, dim=-1).values[:, -1:]  # [b, 1]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """[b, v] with -inf outside the nucleus, the fewest tokens whose mass reaches p (arXiv:1904.09751)."""
    if p in (0.0, 1.0):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the most likely: it always stays
    outside = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= p)
    return logits.masked_fill(outside, float("-inf"))


def sample(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """[b] int64: the next token of each row.

    Args:
        logits: [b, v], any float type; columns of padding tokens are cut off already.
        generators: one a row; greedy decoding draws nothing from them.
    """
    logits = logits.float().cpu()
    if params.is_greedy:
        return logits.argmax(dim=-1)
    kept = keep_top_p(keep_top_k(logits / params.temperature, params.top_k), params.top_p)
    probabilities = kept.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators)]
    return torch.cat(drawn)
