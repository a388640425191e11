"""The next token: truncation of the distribution and draws from it."""

import pytest
import torch

from megatron.inference.sampling import SamplingParams, keep_top_k, keep_top_p, row_generators, sample

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def kept(logits: torch.Tensor) -> list[list[bool]]:
    return torch.isfinite(logits).tolist()


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, [[True] * 4, [True] * 4]),
        (1, [[True, False, False, False], [False, False, False, True]]),
        (2, [[True, True, False, False], [False, False, True, True]]),
        (9, [[True] * 4, [True] * 4]),
    ],
)
def test_top_k_keeps_the_most_likely(k: int, expected: list[list[bool]]) -> None:
    assert kept(keep_top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [[True, False, False, False], [False, False, False, True]]),
        (0.45, [[True, False, False, False], [False, False, True, True]]),
        (0.6, [[True, True, False, False], [False, False, True, True]]),
        (0.8, [[True, True, True, False], [False, True, True, True]]),
        (0.0, [[True] * 4, [True] * 4]),
        (1.0, [[True] * 4, [True] * 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(p: float, expected: list[list[bool]]) -> None:
    assert kept(keep_top_p(LOGITS, p)) == expected


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(temperature=0.0, top_p=0.9)])
def test_greedy_takes_the_most_likely(params: SamplingParams) -> None:
    assert sample(LOGITS, params, row_generators(params, 2)).tolist() == [0, 3]


def test_draws_follow_the_tempered_distribution() -> None:
    params = SamplingParams(temperature=2.0)
    row = LOGITS[:1]
    generators = row_generators(params, 1)
    draws = torch.cat([sample(row, params, generators) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    # Four standard deviations of a frequency from 4000 draws are at most 0.032.
    torch.testing.assert_close(frequencies, (row[0] / 2).softmax(-1), atol=0.032, rtol=0)


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    params = SamplingParams(seed=7)
    both, alone = row_generators(params, 2), row_generators(params, 2)
    for _ in range(20):
        together = sample(LOGITS, params, both)
        assert sample(LOGITS[1:], params, alone[1:]).item() == together[1].item()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 1.1), ("top_p", -0.1), ("num_tokens_to_generate", -1)],
)
def test_impossible_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})
