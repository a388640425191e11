"""Which experts tokens go to, with which weights, and how many of them an expert takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.transformer.moe.routing import choose_experts, expert_capacity, group_limited_topk, limit_to_capacity

LOGITS = torch.tensor([[1.0, 2, 3, 4], [0.5, 0.1, -1, 0.2], [2, 2.5, 0, -1]])
BIAS = torch.tensor([1.0, 0, 0, -1])

PUBLISHED: list[tuple[dict[str, Any], list[dict[int, float]]]] = [
    # options, for each row {expert: weight}
    ({}, [{2: 0.26894, 3: 0.73106}, {0: 0.57444, 3: 0.42556}, {0: 0.37754, 1: 0.62246}]),
    ({"pre_softmax": True}, [{2: 0.23688, 3: 0.64391}, {0: 0.37961, 3: 0.28122}, {0: 0.35288, 1: 0.58180}]),
    (
        {"score_function": "sigmoid", "scaling_factor": 2.5},
        [{2: 1.23098, 3: 1.26902}, {0: 1.32744, 3: 1.17256}, {0: 1.21998, 1: 1.28002}],
    ),
    ({"score_function": "sigmoid", "expert_bias": BIAS}, [{0: 0.43422, 2: 0.56578}, {0: 0.54248, 1: 0.45752}]),
    ({"num_groups": 2, "group_topk": 1}, [{2: 0.26894, 3: 0.73106}, {0: 0.59869, 1: 0.40131}]),
]


@pytest.mark.parametrize("options, rows", PUBLISHED, ids=[" ".join(options) or "softmax" for options, _ in PUBLISHED])
def test_published_weights(options: dict[str, Any], rows: list[dict[int, float]]) -> None:
    weights, chosen = choose_experts(LOGITS, 2, **options)
    for row, expected in enumerate(rows):
        assert set(chosen[row].nonzero().flatten().tolist()) == set(expected)
        for expert, weight in expected.items():
            assert weights[row, expert].item() == pytest.approx(weight, abs=5e-6)
    assert torch.equal(weights != 0, chosen)


def test_an_unknown_score_function_is_refused() -> None:
    with pytest.raises(ValueError, match="softmax and sigmoid are known"):
        choose_experts(LOGITS, 2, score_function="relu")


def test_groups_by_brute_force() -> None:
    torch.manual_seed(0)
    scores = torch.rand(50, 12)
    values, indices = group_limited_topk(scores, 4, 50, 12, 4, 2)
    for row, found in zip(scores.tolist(), indices.tolist()):
        worth = [sum(sorted(row[3 * g : 3 * g + 3])[-2:]) for g in range(4)]
        best_groups = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = [e for g in best_groups for e in range(3 * g, 3 * g + 3)]
        assert found == sorted(allowed, key=lambda e: -row[e])[:4]
    assert torch.equal(values, scores.gather(1, indices))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_by_brute_force(policy: str, pad: bool) -> None:
    torch.manual_seed(1)
    weights, chosen = choose_experts(torch.randn(40, 5), 2)
    capacity = expert_capacity(40, 2, 5, 0.75)
    assert capacity == 12
    kept_weights, kept = limit_to_capacity(weights, chosen, capacity, policy, pad)
    for expert in range(5):
        tokens = chosen[:, expert].nonzero().flatten().tolist()
        if policy == "probs":
            tokens = sorted(tokens, key=lambda t: -weights[t, expert].item())
        expected = set(tokens[:capacity])
        column = kept[:, expert].nonzero().flatten().tolist()
        assert {t for t in column if kept_weights[t, expert] > 0} == expected
        assert len(column) == capacity if pad else set(column) == expected
        assert all(kept_weights[t, expert] == weights[t, expert] for t in expected)


def test_capacity_is_never_more_than_all_tokens() -> None:
    assert expert_capacity(4, 2, 4, 10.0) == 4
    with pytest.raises(ValueError, match="probs and position are known"):
        limit_to_capacity(torch.ones(1, 1), torch.ones(1, 1).bool(), 1, "random")
