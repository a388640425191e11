"""Dropout on attention's probabilities over context parallel ranks: statistics, gradients, repeatability."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import checkpoint, get_all_rng_states, get_cuda_rng_tracker
from megatron.core.transformer.attention_backends import build_core_attention
from megatron.core.transformer.context_parallel import attend_across_ranks
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

N, B, A, D, P = 16, 1, 4, 4, 0.25  # tokens of a rank, samples, heads, channels, probability
WAYS = ["p2p", "all_gather", "a2a"]


def core_of(way: str) -> torch.nn.Module:
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(5)
    config = TransformerConfig(
        num_layers=1, hidden_size=A * D, num_attention_heads=A, attention_dropout=P, context_parallel_size=size
    )
    core = build_core_attention(config, layer_number=1, attn_mask_type=AttnMaskType.no_mask, attention_type="self")
    return attend_across_ranks(core, way, ProcessGroupCollection.from_parallel_state())


def inputs() -> list[Tensor]:
    """Queries, keys and values of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(N, B, A, D, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def kept_probabilities(way: str) -> tuple[Tensor, Tensor]:
    """What is left of the probabilities of 1/s each, over 1/s: of this rank's N queries, for two calls.

    Keys are equal, so that all probabilities are; values are the rows of the identity, which reads them off.
    """
    core, size, rank = core_of(way), dist.get_world_size(), dist.get_rank()
    zeros = torch.zeros(N, B, A, N * size)
    places = torch.cat([torch.arange(N // 2) + chunk * N // 2 for chunk in (rank, 2 * size - 1 - rank)])
    values = torch.eye(N * size)[places][:, None, None].expand(N, B, A, -1)
    calls = [core(zeros, zeros, values, None).view(N, A, -1) * N * size for _ in range(2)]
    return calls[0], calls[1]


@pytest.mark.parametrize("way", WAYS)
def test_each_probability_is_kept_or_dropped_by_itself(way: str) -> None:
    calls = [torch.stack(call) for call in zip(*run_ranks(2, kept_probabilities, way))]  # [rank, N, A, s] each
    for kept in calls:
        values = kept.unique()
        torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - P)]))
        share = (kept > 0).double()
        spread = (P * (1 - P) / share.numel()) ** 0.5
        assert abs(share.mean() - (1 - P)) < 4 * spread
        # Ranks, heads and queries draw by themselves: what one keeps says nothing of another.
        for one, other in ((share[0], share[1]), (share[:, :, 0], share[:, :, 1]), (share[:, 0], share[:, 1])):
            together = (one * other).mean()
            assert abs(together - (1 - P) ** 2) < 5 * (1 / one.numel()) ** 0.5 * 0.5
    assert not torch.equal(*calls)


def check_gradients(way: str) -> None:
    core, (q, k, v) = core_of(way), inputs()
    states = get_all_rng_states()[1:]
    grad = torch.randn(N, B, A * D, generator=torch.Generator().manual_seed(9 + dist.get_rank()), dtype=torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        torch.set_rng_state(states[0])
        get_cuda_rng_tracker().set_states(states[1])
        return core(*tensors, None)

    context = run(q, k, v)
    context.backward(grad)
    assert torch.equal(run(q, k, v), context)  # the same numbers again
    # The derivative along a direction, by differences of the whole function with the same dropout.
    steps = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype) for x in (q, k, v)]
    with torch.no_grad():
        ahead, behind = (run(*(x + h * d for x, d in zip((q, k, v), steps))) for h in (1e-5, -1e-5))
        by_difference = ((ahead - behind) / 2e-5 * grad).sum()
        by_gradient = sum((x.grad * d).sum() for x, d in zip((q, k, v), steps))
    for total in (by_difference, by_gradient):
        dist.all_reduce(total)
    torch.testing.assert_close(by_gradient, by_difference, rtol=1e-6, atol=1e-8)
    # Recomputed in backward, it draws the same.
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.set_rng_state(states[0])
    checkpoint(run, False, *again).backward(grad)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip((q, k, v), again))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_what_was_kept(way: str) -> None:
    run_ranks(2, check_gradients, way)


def check_generators() -> tuple[Tensor, Tensor]:
    core, tensors = core_of("a2a"), inputs()
    core(*tensors, None)
    _, default, streams = get_all_rng_states()
    return default, streams["model-parallel-rng"]


def test_generators_of_all_ranks_go_on_alike() -> None:
    (default, stream), (other_default, other_stream) = run_ranks(2, check_generators)
    assert torch.equal(default, other_default) and torch.equal(stream, other_stream)
