"""Losses and assignments that spread tokens over experts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.aux_loss import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    mean_aux_losses,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.balancing import (
    names_of_balancing_losses,
    router_z_loss,
    scores_of_all_experts,
    sequence_load_balancing_loss,
    sinkhorn,
    switch_load_balancing_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


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


def test_several_losses_each_with_its_coefficient() -> None:
    """Three losses at once, of two micro-batches: the last looks at both, and forgets them with the step."""
    torch.manual_seed(1)
    coeffs = {"aux_loss": 0.5, "seq_aux_loss": 0.25, "global_aux_loss": 2.0}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        add_bias_linear=False,
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        moe_router_load_balancing_type=list(coeffs),
        moe_aux_loss_coeff=list(coeffs.values()),
        params_dtype=torch.float64,
    )
    router = TopKRouter(config)
    router.set_layer_number(1)
    torch.nn.init.normal_(router.weight)
    seen = torch.zeros(4)
    get_moe_layer_wise_logging_tracker().clear()  # a model of more layers may have been in this process
    for step in range(2):
        x = torch.randn(6, 3, 8, dtype=torch.float64)
        weights, _ = router(x)
        (found,) = torch.autograd.grad(0 * weights.sum(), router.weight)
        scores, chosen = scores_of_all_experts(x.flatten(0, 1) @ router.weight.t(), 2, "softmax")
        seen = seen + chosen.sum(0)
        losses = {
            "load_balancing_loss": switch_load_balancing_loss(scores, chosen.sum(0), 18, 2),
            "seq_load_balancing_loss": sequence_load_balancing_loss(
                scores.view(6, 3, 4), chosen.view(6, 3, 4).sum(0), 6, 2
            ),
            "global_load_balancing_loss": switch_load_balancing_loss(scores, seen / (step + 1), 18, 2),
        }
        total = sum(coeff * loss for coeff, loss in zip(coeffs.values(), losses.values()))
        (expected,) = torch.autograd.grad(total, router.weight)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        noted = mean_aux_losses(num_microbatches=1, num_moe_layers=1)
        for name, loss in losses.items():
            assert noted[name][1].tolist() == pytest.approx([loss.item()], rel=1e-6)
    router.begin_batch()
    assert router.batch_steps == 0 and not router.batch_tokens_per_expert.any()
    clear_aux_losses_tracker()


def test_a_second_model_may_have_more_layers() -> None:
    for num_layers in (1, 3, 2):
        save_to_aux_losses_tracker("a test of sizes", torch.tensor(float(num_layers)), num_layers, num_layers)
    assert get_moe_layer_wise_logging_tracker().pop("a test of sizes").values.tolist() == [1.0, 2.0, 3.0]


def test_trackers_get_each_loss() -> None:
    clear_aux_losses_tracker()
    for layer in (1, 3):
        save_to_aux_losses_tracker("another test", torch.tensor(2.0 * layer), layer, num_layers=4)
    written: dict[str, float] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, iteration: written.update({name: float(value)}))
    total = {"another test": torch.tensor(1.0)}
    moe_utils.track_moe_metrics(
        0.5,
        7,
        writer,
        total_loss_dict=total,
        per_layer_logging=True,
        track_names=["another test"],
        num_layers=4,
        moe_layer_freq=2,
    )
    assert written["another test"] == 2.0 and total["another test"] == 3.0
    assert [written[f"moe/another test_layer_{i}"] for i in range(4)] == [1, 0, 3, 0]
    assert not get_moe_layer_wise_logging_tracker()["another test"].values.any()


def test_a_loss_that_stands_alone_has_the_common_name() -> None:
    alone = SimpleNamespace(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1)
    assert names_of_balancing_losses(alone) == {"seq_aux_loss": "load_balancing_loss"}
    both = SimpleNamespace(
        moe_router_load_balancing_type=["seq_aux_loss", "global_aux_loss", "aux_loss"], moe_aux_loss_coeff=[0.1, 0.2, 0]
    )
    assert names_of_balancing_losses(both) == {
        "seq_aux_loss": "seq_load_balancing_loss",
        "global_aux_loss": "global_load_balancing_loss",
    }


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
