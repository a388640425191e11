"""Attention over context parallel ranks equals attention in fp64 on one process: results and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention_backends import build_core_attention
from megatron.core.transformer.context_parallel import ContextParallelAttention, attend_across_ranks
from megatron.core.transformer.context_parallel.layout import positions
from megatron.core.transformer.context_parallel.packed import sequence_layout
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.transformer.context_parallel.oracle import A, B, Case, D, S, attention, cases
from tests.worker_pool import run_ranks

WAYS = ["p2p", "all_gather", "a2a", "a2a+p2p"]
Errors = dict[str, float]


def start(size: int, way: str) -> None:
    levels = [2, size // 2] if way == "a2a+p2p" else None
    parallel_state.initialize_model_parallel(context_parallel_size=size, hierarchical_context_parallel_sizes=levels)


def core_of(case: Case, way: str, backend: str, **settings: object) -> ContextParallelAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=A * D,
        num_attention_heads=A,
        attention_dropout=0.0,
        attention_backend=AttnBackend[backend],
        window_size=case.window,
        context_parallel_size=dist.get_world_size(),
        hierarchical_context_parallel_sizes=[2, dist.get_world_size() // 2],
        **settings,  # type: ignore[arg-type]
    )
    core = build_core_attention(config, layer_number=1, attn_mask_type=case.mask_type, attention_type="self")
    return attend_across_ranks(core, way, ProcessGroupCollection.from_parallel_state())


def own_tokens(case: Case) -> Tensor:
    """[n, b]: positions of this rank's tokens."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    layout = sequence_layout(case.packed, S, B, size)
    rows = [layout.row(row if len(layout.pieces) > 1 or len(layout.documents) > 1 else 0) for row in range(B)]
    return torch.tensor([positions(row, rank) for row in rows]).t()


def compare(case: Case, way: str, backend: str, groups: int, dtype: torch.dtype, seed: int = 0) -> Errors:
    """Relative 2-norm of each deviation from fp64 on one process, over this rank's tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(S, B, A, D), (S, B, groups, D), (S, B, groups, D), (S, B, A, D)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes)
    whole = [x.requires_grad_() for x in (q, k, v)]
    expected = attention(*whole, case.hidden, D**-0.5)
    expected.backward(grad)
    places, samples = own_tokens(case), torch.arange(B)

    def own(x: Tensor) -> Tensor:
        return x.detach()[places, samples]

    parts = [own(x).to(dtype).requires_grad_() for x in whole]
    mask = case.mask
    if mask is not None and mask.size(2) > 1:
        mask = torch.stack([mask[i, :, places[:, i]] for i in range(B)])
    context = core_of(case, way, backend)(*parts, mask, case.mask_type, packed_seq_params=case.packed)
    context.backward(own(grad).to(dtype).flatten(2))
    pairs = [(context.unflatten(-1, (A, D)), expected)] + [(x.grad, y.grad) for x, y in zip(parts, whole)]
    assert all(bool(found.isfinite().all()) for found, _ in pairs)
    names = ("context", "dq", "dk", "dv")
    # An error is measured against the whole tensor: a rank's own part may be zero.
    return {
        name: float((found.detach().double() - own(wanted)).norm() / wanted.detach().norm())
        for name, (found, wanted) in zip(names, pairs)
    }


def check_all(size: int, way: str, dtype: torch.dtype, all_groups: list[int]) -> dict[str, Errors]:
    start(size, way)
    found = {}
    for number, (name, case) in enumerate(cases().items()):
        for backend in case.backends:
            groups = all_groups[number % len(all_groups)]
            found[f"{name}, {backend}, {groups} groups"] = compare(case, way, backend, groups, dtype)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process(size: int, way: str) -> None:
    for groups in ([4, 1, 2], [1, 2, 4]):  # fewer groups than ranks among them
        for rank, found in enumerate(run_ranks(size, check_all, size, way, torch.float32, groups)):
            for name, errors in found.items():
                assert max(errors.values()) < 1e-5, (rank, name, errors)
