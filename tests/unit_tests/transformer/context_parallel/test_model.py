"""A whole GPT over packed sequences that are cut one by one: losses and parameter gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.context_parallel.layout import positions
from megatron.core.transformer.context_parallel.packed import sequence_layout
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

N, VOCAB = 48, 32
PADDED = [0, 8, 32, 48]
LENGTHS = [0, 7, 29, 42]  # the last two tokens, and others, are padding


def model_of(tp: int, cp: int, positions_by: str, ways: list[str], recompute: str | None) -> GPTModel:
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1,
        cp_comm_type=ways,
        hierarchical_context_parallel_sizes=[2, cp // 2] if cp > 1 else None,
        recompute_granularity=recompute,  # type: ignore[arg-type]
    )
    spec = get_gpt_layer_local_spec()
    return GPTModel(config, spec, VOCAB, N, position_embedding_type=positions_by)  # type: ignore[arg-type]


def losses_and_gradients(
    tp: int, cp: int, positions_by: str, ways: list[str], recompute: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of each token of the micro-batch, gradient of each parameter that every rank holds whole)."""
    levels = [2, cp // 2] if cp > 1 else None
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp, hierarchical_context_parallel_sizes=levels)
    starts, padded = (torch.tensor(x, dtype=torch.int32) for x in (LENGTHS, PADDED))
    packed = PackedSeqParams("thd", starts, starts, padded, padded)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, VOCAB, (2, 1, N), generator=generator)
    # A token's place in its sequence, as a loader of packed sequences numbers it.
    places = torch.cat([torch.arange(b - a) for a, b in zip(PADDED, PADDED[1:])])[None]
    counts = torch.cat([torch.arange(b - a) < d - c for a, b, c, d in zip(PADDED, PADDED[1:], LENGTHS, LENGTHS[1:])])
    own = torch.tensor(positions(sequence_layout(packed, N, 1, cp), parallel_state.get_context_parallel_rank()))
    model = model_of(tp, cp, positions_by, ways, recompute)
    loss = model(tokens[:, own], places[:, own], None, labels=labels[:, own], packed_seq_params=packed)
    (loss * counts[own]).sum().backward()
    group = parallel_state.get_context_parallel_group()
    whole = torch.zeros(N).index_put((own,), loss.detach()[0])
    dist.all_reduce(whole, group=group)
    gradients = {}
    for name, param in model.named_parameters():
        if getattr(param, "tensor_model_parallel", False) and tp > 1:
            continue
        assert param.grad is not None
        dist.all_reduce(param.grad, group=group)
        if getattr(param, "sequence_parallel", False) and tp > 1:
            dist.all_reduce(param.grad, group=parallel_state.get_tensor_model_parallel_group())
        gradients[name] = param.grad
    return whole * counts, gradients


@pytest.mark.parametrize(
    ("tp", "cp", "positions_by", "ways", "recompute"),
    [
        (1, 2, "rope", ["p2p"] * 4, None),
        (1, 4, "learned_absolute", ["p2p", "a2a", "all_gather", "a2a+p2p"], "selective"),
        (2, 2, "rope", ["a2a", "p2p", "a2a+p2p", "all_gather"], None),
    ],
)
def test_packed_sequences(tp: int, cp: int, positions_by: str, ways: list[str], recompute: Any) -> None:
    ((losses, gradients),) = run_ranks(1, losses_and_gradients, 1, 1, positions_by, ["p2p"] * 4)
    for found, found_gradients in run_ranks(tp * cp, losses_and_gradients, tp, cp, positions_by, ways, recompute):
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
        assert len(found_gradients) >= 4 * 4
        for name, gradient in found_gradients.items():
            assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
