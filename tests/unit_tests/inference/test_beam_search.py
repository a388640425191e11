"""Beams over made-up distributions: what a search through all texts finds, and when the search ends."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from megatron.inference.beam_search import Extend, Hypothesis, Tokens, beam_search

WORDS, STOP = 4, 0


def log_probs(tokens: Tokens) -> list[float]:
    """Of the next token: random, but the same for the same beginning."""
    seed = 7 + sum((token + 1) * 5**place for place, token in enumerate(tokens))
    return torch.randn(WORDS, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(0).tolist()


async def extend(continuations: Sequence[Tokens], count: int) -> list[list[tuple[int, float]]]:
    rows = [sorted(enumerate(log_probs(tokens)), key=lambda one: -one[1]) for tokens in continuations]
    return [row[:count] for row in rows]


def search(width: int, max_tokens: int, penalty: float, ask: Extend = extend) -> list[Hypothesis]:
    return asyncio.run(beam_search(ask, width, max_tokens, STOP, penalty))


def all_texts(max_tokens: int, penalty: float) -> list[Hypothesis]:
    """Every text that ends with the stop token, or is as long as may be; best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(WORDS), repeat=length):
            if STOP in tokens[:-1] or (length < max_tokens and tokens[-1] != STOP):
                continue
            total = sum(log_probs(tokens[:place])[tokens[place]] for place in range(length))
            shown = tokens[:-1] if tokens[-1] == STOP else tokens
            found.append(Hypothesis(shown, total / length**penalty))
    return sorted(found, key=lambda one: -one.score)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_a_wide_search_finds_the_best_of_all_texts(penalty: float) -> None:
    wanted = all_texts(3, penalty)
    found = search(WORDS**3, 3, penalty)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    for one, other in zip(found, wanted):
        assert math.isclose(one.score, other.score, rel_tol=1e-9)


def test_one_beam_is_greedy() -> None:
    (found,) = search(1, 5, 1.0)
    tokens: Tokens = ()
    while len(tokens) < 5 and (best := max(range(WORDS), key=lambda token: log_probs(tokens)[token])) != STOP:
        tokens = (*tokens, best)
    assert found.tokens == tokens


def test_the_search_ends_when_nothing_better_can_come() -> None:
    steps = 0

    async def ends_at_once(continuations: Sequence[Tokens], count: int) -> list[list[tuple[int, float]]]:
        nonlocal steps
        steps += 1
        return [[(STOP, -0.01), (1, -5.0)] for _ in continuations]

    assert search(1, 50, 1.0, ends_at_once) == [Hypothesis((), -0.01)] and steps == 1


def test_nothing_to_generate() -> None:
    assert search(3, 0, 1.0) == [Hypothesis((), 0.0)]
