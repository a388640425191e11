"""Tokens put into the order of their experts and added up again, and the weights of a router, beside sums over masks:
values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.transformer.moe.permutation import permute, sort_chunks_by_idxs, unpermute
from megatron.core.transformer.moe.routing import choose_experts

N, E, H = 12, 5, 4


def test_there_and_back_is_a_sum_over_chosen_experts() -> None:
    torch.manual_seed(0)
    tokens, weights = torch.randn(N, H).double().requires_grad_(), torch.rand(N, E).double().requires_grad_()
    chosen = torch.rand(N, E) < 0.4
    factors = torch.randn(E).double()  # what each expert does with its rows
    rows, of_rows, source = permute(tokens, chosen, weights)
    assert of_rows is not None
    counts = chosen.sum(0)
    output = unpermute(rows * (of_rows * factors.repeat_interleave(counts)).unsqueeze(1), source, N)
    expected = torch.einsum("nh,ne,ne,e->nh", tokens, weights, chosen.double(), factors)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(y, (tokens, weights), direction) for y in (output, expected))
    torch.testing.assert_close(found, wanted)


def test_chunks_in_another_order() -> None:
    rows, weights = torch.randn(9, H, requires_grad=True), torch.rand(9, requires_grad=True)
    sizes, order = torch.tensor([2, 0, 4, 3]), torch.tensor([3, 1, 0, 2])
    found = sort_chunks_by_idxs(rows, sizes, order, weights)
    parts = [x.split(sizes.tolist()) for x in (rows, weights)]
    expected = [torch.cat([part[i] for i in order.tolist()]) for part in parts]
    for one, other, leaf in zip(found, expected, (rows, weights)):
        assert one is not None
        torch.testing.assert_close(one, other)
        direction = torch.randn_like(other)
        torch.testing.assert_close(*(torch.autograd.grad(y, leaf, direction, retain_graph=True) for y in (one, other)))


@pytest.mark.parametrize(
    "options",
    [{}, {"pre_softmax": True}, {"score_function": "sigmoid", "scaling_factor": 2.0}],
    ids=lambda options: " ".join(options) or "softmax",
)
def test_router_weights_beside_masked_scores(options: dict[str, Any]) -> None:
    logits = torch.randn(N, E, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    weights, chosen = choose_experts(logits, 2, **options)
    assert torch.equal(chosen.sum(1), torch.full((N,), 2))
    if options.get("pre_softmax"):
        expected = torch.softmax(logits, -1) * chosen
    elif options:
        scores = torch.sigmoid(logits) * chosen
        expected = 2.0 * scores / scores.sum(1, keepdim=True)
    else:
        expected = torch.softmax(logits.masked_fill(~chosen, -torch.inf), -1)
    torch.testing.assert_close(weights, expected)
    direction = torch.randn_like(weights)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits, direction) for y in (weights, expected)))
