"""How tokens are drawn, and what is reported of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SamplingParams:
    """Settings of one request. Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it; 0 is greedy."""

    top_k: int = 0
    """Draw among the k most likely tokens only; 1 is greedy, 0 is no limit."""

    top_p: float = 0.0
    """Draw among the most likely tokens that together reach this probability (arXiv:1904.09751); 0 is no limit."""

    return_log_probs: bool = False
    """Give the log-probabilities of the prompt's and of the generated tokens, before any filter."""

    return_segments: bool = False
    """Give the text of each token."""

    num_tokens_to_generate: int = 30
    """Tokens after the prompt, at most."""

    top_n_logprobs: int = 0
    """Give the log-probabilities of this many most likely tokens at each generated position."""

    return_prompt_top_n_logprobs: bool = False
    """The same for the prompt's positions."""

    min_p: float = 0.0
    """Draw among tokens that are at least this times as likely as the most likely one (arXiv:2407.01082)."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that came before (arXiv:1909.05858, section 4.1)."""

    top_p_decay: float = 0.0
    """`top_p` is multiplied by this after each generated token; 0 is not at all."""

    top_p_bound: float = 0.0
    """It does not fall below this."""

    seed: int | None = None
    """Of the request's own random stream; None takes the engine's seed and the request's number."""

    stop_token_ids: tuple[int, ...] = field(default=())
    """Tokens that end the text; the one that does is the last generated token."""

    forbidden_pairs: tuple[tuple[int, int], ...] = field(default=())
    """(before, after): token `after` is never drawn right after `before`."""

    ignore_termination: bool = False
    """Go on after an end-of-document token."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError: a value is out of its range, or two exclude each other."""
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_p_decay", "top_p_bound"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} ({getattr(self, name)}) must be a finite number")
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive, or 0 for greedy decoding")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be positive, or 0 for no limit")
        for name in ("top_p", "min_p", "top_p_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be between 0 and 1")
        if not 0 <= self.top_p_bound <= max(self.top_p, 0.0):
            raise ValueError(f"top_p_bound ({self.top_p_bound}) must be between 0 and top_p ({self.top_p})")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty ({self.repetition_penalty}) must be positive; 1 is none")
        if self.num_tokens_to_generate < 0:
            raise ValueError(f"num_tokens_to_generate ({self.num_tokens_to_generate}) must not be negative")
        if self.top_n_logprobs < 0:
            raise ValueError(f"top_n_logprobs ({self.top_n_logprobs}) must not be negative")

    def add_attributes(self, attribute_value_pair: dict[str, Any]) -> None:
        """Set further attributes, such as those of one server.

        Raises:
            ValueError: a known one gets a value out of its range.
        """
        for name, value in attribute_value_pair.items():
            setattr(self, name, value)
        self.check()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_plain_argmax(self) -> bool:
        """Greedy, and nothing changes the logits."""
        return self.is_greedy and self.repetition_penalty == 1 and not self.forbidden_pairs

    def nucleus(self, num_generated: int) -> float:
        """`top_p` after this many generated tokens."""
        if not self.top_p_decay:
            return self.top_p
        return max(self.top_p * self.top_p_decay**num_generated, self.top_p_bound)
