"""Muon against its definition by singular values, and in every layout against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.muon import COEFFICIENTS, MatrixPart, Muon, is_matrix, orthogonalized
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from tests.unit_tests.optimizer.training import build, train, weights
from tests.worker_pool import run_ranks

MUON: dict[str, Any] = {"optimizer": "muon"}


def by_singular_values(x: Tensor, steps: int) -> Tensor:
    """The same polynomial of the singular values, in fp64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ v


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40), (3, 16, 24)])
@pytest.mark.parametrize("cut", [None, -2, -1])
def test_iterations_move_singular_values_only(shape: tuple[int, ...], cut: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonalized(x, 5, cut)
    torch.testing.assert_close(found.double(), by_singular_values(x, 5), rtol=1e-4, atol=1e-4)
    singular = torch.linalg.svdvals(orthogonalized(torch.randn(32, 64), 5))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert orthogonalized(torch.zeros(shape), 5, cut).eq(0).all()


@pytest.mark.parametrize("cut", [-2, -1])
def test_parts_of_two_ranks_are_those_of_the_whole(cut: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 20)
    parts = run_ranks(2, orthogonalize_part, x, cut)
    torch.testing.assert_close(torch.cat(parts, cut), orthogonalized(x, 5, cut), rtol=1e-5, atol=1e-6)


def orthogonalize_part(x: Tensor, cut: int) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    return orthogonalized(x.chunk(2, cut)[group.rank()], 5, cut, group)


SCALED = {"spectral": 12.0**0.5, "shape_scaling": 2.0**0.5, "unit_rms_norm": 2.0**0.5}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mode", SCALED)
def test_a_step_is_what_the_paper_says(mode: Any, nesterov: bool) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12))
    settings = {"muon_scale_mode": mode, "muon_use_nesterov": nesterov, "muon_momentum": 0.5}
    config = OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.2, muon_extra_scale_factor=3.0, **settings)
    muon = Muon([{"params": [weight, bias]}], config)
    muon.take_matrices({weight: MatrixPart.of(weight, 0, 72, None)})
    expected, mean = weight.detach().double(), torch.zeros(12, 6, dtype=torch.float64)
    adam_bias = nn.Parameter(bias.detach().clone())
    adam = torch.optim.AdamW([adam_bias], lr=0.1, weight_decay=0.2, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(12, 6), torch.randn(12)
        adam_bias.grad, grad = bias.grad.clone(), weight.grad.double()
        mean = (mean + grad) / 2
        direction = (grad + mean) / 2 if nesterov else mean
        update = 3 * SCALED[mode] * by_singular_values(direction, 5)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * update
        muon.step()
        adam.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, adam_bias)


def test_stacked_matrices_are_orthogonalized_one_by_one() -> None:
    torch.manual_seed(0)
    gate_and_up = nn.Parameter(torch.randn(2 * 8, 6))
    set_tensor_model_parallel_attributes(gate_and_up, True, 0, 2)
    start = gate_and_up.detach().clone()
    muon = Muon([{"params": [gate_and_up]}], OptimizerConfig(optimizer="muon", lr=1.0, weight_decay=0.0))
    muon.take_matrices({gate_and_up: MatrixPart.of(gate_and_up, 0, 96, None)})
    gate_and_up.grad = torch.randn(16, 6)
    muon.step()
    wanted = torch.cat([by_singular_values(half, 5) for half in gate_and_up.grad.chunk(2)]) * 0.2 * 8**0.5
    torch.testing.assert_close((start - gate_and_up.detach()).double(), wanted, rtol=1e-4, atol=1e-4)


def test_which_parameters_are_matrices() -> None:
    table, experts = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(3, 8, 4))
    set_tensor_model_parallel_attributes(experts, True, 1, 1)
    assert is_matrix("decoder.layers.0.mlp.linear_fc1.weight", nn.Parameter(torch.zeros(8, 4)))
    assert is_matrix("decoder.layers.0.mlp.experts.weight1", experts)
    assert not is_matrix("embedding.position_embeddings.weight", table)
    assert not is_matrix("decoder.layers.0.mixer.conv1d.weight", nn.Parameter(torch.zeros(8, 1, 4)))
    assert not is_matrix("decoder.layers.0.mlp.linear_fc1.bias", nn.Parameter(torch.zeros(8)))
    table.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
    assert not is_matrix("output_layer.weight", table)


def trained(dtype: torch.dtype, sharded: bool) -> dict[str, Tensor]:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(dtype, sharded=sharded, **MUON)
    train(ddp, optimizer, range(4))
    return weights(ddp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranges_of_elements_give_what_one_process_gives(dtype: torch.dtype) -> None:
    (alone,) = run_ranks(1, trained, dtype, False)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for ranks, sharded in ((2, True), (2, False), (4, True)):
        for found in run_ranks(ranks, trained, dtype, sharded):
            torch.testing.assert_close(found, alone, **close)
