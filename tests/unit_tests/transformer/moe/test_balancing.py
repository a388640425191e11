"""Losses and assignments that spread tokens over experts."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.core.transformer.moe.aux_loss import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    mean_aux_losses,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.balancing import (
    router_z_loss,
    scores_of_all_experts,
    sequence_load_balancing_loss,
    sinkhorn,
    switch_load_balancing_loss,
)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_losses_by_their_formulas(function: str) -> None:
    torch.manual_seed(0)
    tokens, experts, k = 24, 6, 2
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    scores, chosen = scores_of_all_experts(logits, k, function)
    expected = [[math.exp(x) if function == "softmax" else 1 / (1 + math.exp(-x)) for x in row] for row in logits]
    expected = [[x / sum(row) for x in row] for row in expected]
    assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-14)
    counts = [sum(sorted(row)[-k] <= row[e] for row in expected) for e in range(experts)]
    by_hand = sum(sum(row[e] for row in expected) * counts[e] for e in range(experts)) * experts / (tokens**2 * k)
    loss = switch_load_balancing_loss(scores, chosen.sum(0), tokens, k)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    z = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()) / tokens
    assert router_z_loss(logits, tokens).item() == pytest.approx(z, rel=1e-12)
    of_sequences = sequence_load_balancing_loss(
        scores.view(8, 3, experts), chosen.view(8, 3, experts).sum(0), 8, k
    )  # sequence b has the tokens 3 s + b
    apart = [switch_load_balancing_loss(scores[b::3], chosen[b::3].sum(0), 8, k) for b in range(3)]
    assert of_sequences.item() == pytest.approx(sum(a.item() for a in apart) / 3, rel=1e-12)


def test_an_even_load_has_loss_one() -> None:
    scores = torch.full((8, 4), 0.25)
    assert switch_load_balancing_loss(scores, torch.full((4,), 4), 8, 2).item() == pytest.approx(1.0)


def test_sinkhorn_evens_rows_and_columns() -> None:
    torch.manual_seed(2)
    balanced = sinkhorn(3 * torch.randn(64, 8))
    assert torch.allclose(balanced.sum(0), torch.full((8,), 1 / 8), rtol=1e-2)
    assert torch.allclose(balanced.sum(1), torch.full((64,), 1 / 64), rtol=1e-2)


def test_a_loss_joins_backward_with_the_scale_of_the_model() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    try:
        MoEAuxLossAutoScaler.set_loss_scale(8.0)
        (MoEAuxLossAutoScaler.apply(x, (x**2).sum()) * torch.tensor([3.0, 5.0])).sum().backward()
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(1.0)
    assert x.grad is not None and x.grad.tolist() == [3.0 + 8 * 2, 5.0 + 8 * 4]


def test_what_is_logged_is_the_mean_over_layers_and_microbatches() -> None:
    for microbatch in (1.0, 3.0):
        save_to_aux_losses_tracker("a test", torch.tensor(microbatch), 2, num_layers=4)
        save_to_aux_losses_tracker("a test", torch.tensor(2 * microbatch), 4, num_layers=4)
    mean, by_layer = mean_aux_losses(num_microbatches=2, num_moe_layers=2)["a test"]
    assert by_layer.tolist() == [0, 2, 0, 4] and mean.item() == 3
    clear_aux_losses_tracker()
    assert mean_aux_losses(2, 2)["a test"][0].item() == 0
