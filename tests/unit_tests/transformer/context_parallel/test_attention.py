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
        for backend in ("auto", "unfused"):
            groups = all_groups[number % len(all_groups)]
            found[f"{name}, {backend}, {groups} groups"] = compare(case, way, backend, groups, dtype)
    return found


def deviations(size: int, way: str, dtype: torch.dtype, groups: list[int]) -> dict[str, Errors]:
    """Over the tokens of all ranks."""
    by_rank = run_ranks(size, check_all, size, way, dtype, groups)
    return {
        name: {what: sum(found[name][what] ** 2 for found in by_rank) ** 0.5 for what in errors}
        for name, errors in by_rank[0].items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process(size: int, way: str) -> None:
    groups = [4, 1, 2] if size == 2 else [1, 2, 4]  # fewer groups than ranks among them
    for name, errors in deviations(size, way, torch.float32, groups).items():
        assert max(errors.values()) < 1e-5, (name, errors)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_rounds_as_often_as_one_process(way: str) -> None:
    """Rounded to half a unit, 2**-9, are probabilities, score gradients, a block's result and the result; sums over
    blocks and ranks are fp32, so that more ranks add nothing."""
    for name, errors in deviations(4, way, torch.bfloat16, [2, 4, 1]).items():
        assert max(errors.values()) < 4 * 2**-9, (name, errors)


def check_empty_rank(way: str, backend: str) -> None:
    """The first rank's queries see nothing: their context and gradient are zero, not nan."""
    start(2, way)
    case = cases()["rows that see nothing"]
    q, k, v = (torch.randn(S // 2, B, A, D, requires_grad=True) for _ in range(3))
    assert case.mask is not None
    context = core_of(case, way, backend)(q, k, v, case.mask[:, :, own_tokens(case)[:, 0]], case.mask_type)
    context.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
    if dist.get_rank() == 0:
        assert not context.any() and not q.grad.any()
        assert k.grad.any() and v.grad.any()  # others see its keys


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_sees_nothing(way: str) -> None:
    for backend in ("auto", "unfused"):
        run_ranks(2, check_empty_rank, way, backend)
