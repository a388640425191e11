"""Blocks combined over all keys equal attention in fp64: every rank's share in turn, without processes; also on CUDA
where there is one."""

from __future__ import annotations

import pytest
import torch

from megatron.core.transformer.attention_masks import effective_window
from megatron.core.transformer.context_parallel.block_kernels import accumulation_type, merge
from megatron.core.transformer.context_parallel.layout import positions
from megatron.core.transformer.context_parallel.packed import sequence_layout
from megatron.core.transformer.context_parallel.task import AttentionTask
from megatron.core.transformer.enums import AttnMaskType
from tests.unit_tests.transformer.context_parallel.oracle import A, B, Case, D, S, attention, cases

SIZE = 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    # Four values are rounded to the type's half unit on the way: probabilities, score gradients, a block's result and
    # the result. More ranks add none: blocks are combined in fp32.
    torch.bfloat16: 4 * 2**-9,
    torch.float16: 4 * 2**-12,
}


def deviations(case: Case, dtype: torch.dtype, device: str, groups: int, *, ring: bool, fuse: bool) -> list[float]:
    """Relative 2-norms for the result and the gradients of q, k and v, all ranks together."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, B, A, D), (S, B, groups, D), (S, B, groups, D), (S, B, A, D)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes)
    whole = [x.requires_grad_() for x in (q, k, v)]
    expected = attention(*whole, case.hidden, D**-0.5)
    expected.backward(grad)
    layout = sequence_layout(case.packed, S, B, SIZE)
    places = [
        torch.tensor([positions(layout.row(row % layout.num_rows), rank) for row in range(B)]).t()
        for rank in range(SIZE)
    ]
    samples = torch.arange(B)
    found = [torch.zeros_like(x, dtype=torch.float64) for x in (expected.detach(), q, k, v)]
    q, k, v, grad = (x.detach().to(device, dtype) for x in (q, k, v, grad))
    for rank in range(SIZE):
        mask = case.mask
        if mask is not None and mask.size(2) > 1:
            mask = torch.stack([mask[i, :, places[rank][:, i]] for i in range(B)])
        order = AttnMaskType.no_mask if case.mask_type is AttnMaskType.arbitrary else case.mask_type
        task = AttentionTask(
            layout,
            rank,
            effective_window(case.window, order, S, S),
            D**-0.5,
            None if mask is None else mask.to(device),
            may_fuse=fuse,
        )
        own = q[places[rank], samples]
        wide = accumulation_type(dtype)
        out = torch.zeros(own.shape, dtype=wide, device=device)
        lse = torch.full((B, A, len(own)), -torch.inf, dtype=wide, device=device)
        holders = [(r, k[places[r], samples], v[places[r], samples]) for r in range(SIZE)] if ring else [(None, k, v)]
        saved = [task.forward(own, keys, values, holder, out, lse) for holder, keys, values in holders]
        out, own_grad = out.to(dtype), grad[places[rank], samples]
        dq = torch.zeros(own.shape, dtype=wide, device=device)
        for (holder, keys, values), extra in zip(holders, saved):
            dk, dv = task.backward(own_grad, own, keys, values, holder, out, lse, extra, dq)
            rows = places[holder] if holder is not None else torch.arange(S)[:, None].expand(S, B)
            for total, part in ((found[2], dk), (found[3], dv)):
                total.index_put_((rows, samples), part.double().cpu(), accumulate=True)
        found[0][places[rank], samples] = out.double().cpu()
        found[1][places[rank], samples] = dq.double().cpu()
    pairs = zip(found, (expected.detach(), *(x.grad for x in whole)))
    return [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_all_keys_in_turn_equal_fp64(dtype: torch.dtype, device: str) -> None:
    for number, (name, case) in enumerate(cases().items()):
        for ring, fuse in ((True, True), (False, True), (True, False)):
            groups = (4, 1, 2)[number % 3]
            found = deviations(case, dtype, device, groups, ring=ring, fuse=fuse)
            assert max(found) < TOLERANCE[dtype], (name, ring, fuse, groups, found)


def test_merging_with_nothing_is_exact() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    lse[..., 0], out[..., 0, :] = -torch.inf, 0.0
    before, weights = out.clone(), lse.clone()
    nothing = torch.full_like(lse, -torch.inf)
    merge(out, lse, torch.zeros_like(out), nothing)
    assert torch.equal(out, before) and torch.equal(lse, weights)
    merge(empty := torch.zeros_like(out), nothing, before, weights)
    assert torch.equal(empty, before) and torch.equal(nothing, weights)
