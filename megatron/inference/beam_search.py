"""Beam search: likely continuations, found by keeping the best few of each length (arXiv:1211.3711, section 2)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from heapq import nlargest

Tokens = tuple[int, ...]

Extend = Callable[[Sequence[Tokens], int], Awaitable[list[list[tuple[int, float]]]]]
"""(continuations, n) -> for each of them its n likeliest next tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Beam:
    """A continuation."""

    tokens: Tokens
    log_prob: float
    """Of all its tokens together, and of the token that ended it."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation."""

    tokens: Tokens
    """Without the token that ended it."""
    score: float
    """log-probability / length^penalty; the token that ended it counts in both."""


async def beam_search(
    extend: Extend, width: int, max_tokens: int, stop_token: int, length_penalty: float = 1.0
) -> list[Hypothesis]:
    """The best `width` continuations, best first; fewer if there are no more.

    A continuation that `stop_token` follows is finished if it is among the best `width` of its step. The search ends
    when no running one would be better than the worst kept if it ended now, or at `max_tokens`.

    Args:
        length_penalty: above 0 longer texts score higher, as log-probabilities are negative; below 0 lower.
    """
    running, finished = [Beam((), 0.0)], list[Hypothesis]()
    for length in range(1, max_tokens + 1):
        scale = length**length_penalty
        running, ended = _split(await _candidates(extend, running, width), width, stop_token)
        finished = _best(finished + [Hypothesis(beam.tokens, beam.log_prob / scale) for beam in ended], width)
        if not running or (len(finished) == width and finished[-1].score >= running[0].log_prob / scale):
            return finished
    scale = max(max_tokens, 1) ** length_penalty
    return _best(finished + [Hypothesis(beam.tokens, beam.log_prob / scale) for beam in running], width)


async def _candidates(extend: Extend, running: Sequence[Beam], width: int) -> list[Beam]:
    """The best 2 `width` by one token longer: as many may end with the stop token, and enough go on."""
    rows = await extend([beam.tokens for beam in running], 2 * width)
    longer = [
        Beam((*beam.tokens, token), beam.log_prob + value) for beam, row in zip(running, rows) for token, value in row
    ]
    return nlargest(2 * width, longer, key=lambda beam: beam.log_prob)


def _split(candidates: Sequence[Beam], width: int, stop_token: int) -> tuple[list[Beam], list[Beam]]:
    """(those that go on, those that have ended and rank high enough)."""
    running = [beam for beam in candidates if beam.tokens[-1] != stop_token][:width]
    ended = [Beam(beam.tokens[:-1], beam.log_prob) for beam in candidates[:width] if beam.tokens[-1] == stop_token]
    return running, ended


def _best(hypotheses: list[Hypothesis], width: int) -> list[Hypothesis]:
    return nlargest(width, hypotheses, key=lambda hypothesis: hypothesis.score)
