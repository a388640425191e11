"""Drawing tokens: the filters against their definitions, the draws against the probabilities."""

from __future__ import annotations

import pytest
import torch

from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.sampling import Draw, candidates, generator_of, penalized, sample
from megatron.core.inference.sampling_params import SamplingParams


def nucleus_by_hand(logits: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """One token after the other, the most likely first, until what came before exceeds top_p."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    kept = order[:top_k] if top_k else order
    total = sum(logits[token].double().exp().item() for token in kept)
    found, before = set(), 0.0
    for token in kept:
        if top_p and found and before > top_p:
            break
        found.add(token)
        before += logits[token].double().exp().item() / total
    return found


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (7, 0.0), (0, 0.5), (0, 0.999), (20, 0.8), (5000, 0.9), (0, 1.0)])
@pytest.mark.parametrize("size", [30, 3000])
def test_candidates_are_those_of_the_definition(top_k: int, top_p: float, size: int) -> None:
    logits = torch.randn(size, generator=generator_of(size)) * 2
    values, tokens = candidates(logits, top_k, top_p)
    assert set(tokens.tolist()) == nucleus_by_hand(logits, top_k, top_p if top_p < 1 else 0.0)
    assert torch.equal(values, logits[tokens])


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    assert candidates(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2, 0.0)[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.3),
        SamplingParams(repetition_penalty=3.0),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(params: SamplingParams) -> None:
    logits, history = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, -0.5]), [1, 2]
    scaled = logits.clone()
    for token in history:
        factor = params.repetition_penalty
        scaled[token] = scaled[token] / factor if scaled[token] > 0 else scaled[token] * factor
    scaled /= params.temperature
    kept = torch.full_like(scaled, -torch.inf)
    tokens = candidates(scaled, params.top_k, params.top_p)[1]
    kept[tokens] = scaled[tokens]
    probabilities = kept.softmax(0)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    draw, count = Draw(params, generator_of(3), history), 4000
    drawn = sample(logits.expand(count, -1), [draw] * count)
    shares = torch.bincount(drawn, minlength=6) / count
    assert (shares - probabilities).abs().max() < 0.04  # five standard deviations
    assert not shares[probabilities == 0].any()


def test_a_row_draws_from_its_own_stream() -> None:
    logits = torch.randn(3, 40, generator=generator_of(0))
    params = SamplingParams(temperature=1.5)

    def draws(rows: list[int]) -> list[int]:
        return sample(logits[rows], [Draw(params, generator_of(10 + row)) for row in rows]).tolist()

    assert draws([0, 1, 2]) == draws([0]) + draws([1]) + draws([2])
    greedy = Draw(SamplingParams(top_k=1), generator_of(5))
    mixed = sample(logits[:2], [greedy, Draw(params, generator_of(11))])
    assert mixed.tolist() == [int(logits[0].argmax()), *draws([1])]
    assert torch.equal(greedy.generator.get_state(), generator_of(5).get_state())


def test_a_penalty_leaves_other_tokens_and_the_input_alone() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalized(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]


def test_the_nucleus_shrinks_to_its_bound() -> None:
    params = SamplingParams(top_p=0.8, top_p_decay=0.5, top_p_bound=0.3)
    assert [params.nucleus(n) for n in range(4)] == pytest.approx([0.8, 0.4, 0.3, 0.3])
    assert SamplingParams(top_p=0.8).nucleus(9) == 0.8


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_p": 0.2, "top_p_bound": 0.3},
        {"repetition_penalty": 0.0},
        {"num_tokens_to_generate": -1},
        {"top_n_logprobs": -1},
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(values))):
        SamplingParams(**values)
    with pytest.raises(ValueError, match=next(reversed(values))):
        CommonInferenceParams().add_attributes(values)
