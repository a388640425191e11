"""What one layer sends to other ranks, counted, against the formulas of docs/context_parallel.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives
from megatron.core.transformer.enums import AttnMaskType
from tests.unit_tests.transformer.context_parallel.oracle import A, B, D, S, cases
from tests.unit_tests.transformer.context_parallel.test_attention import core_of, start
from tests.worker_pool import run_ranks

WIDE = 4  # bytes of what gradients are summed in


def sent_bytes(size: int, way: str, groups: int) -> tuple[int, int]:
    """Bytes that leave this rank in forward and in backward, for bf16."""
    start(size, way)
    sent = [0]

    def count(original: Any, share: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            sent[0] += share(*args)
            return original(*args, **kwargs)

        return counting

    def bytes_of(x: Tensor) -> int:
        return x.numel() * x.element_size()

    def of_members(group_size: int, x: Tensor) -> int:
        return bytes_of(x) * (group_size - 1) // group_size

    def hops(ops: list[dist.P2POp]) -> int:
        return sum(bytes_of(op.tensor) for op in ops if op.op is dist.isend)

    originals = dist.batch_isend_irecv, dist.all_to_all_single, collectives._all_gather, collectives._reduce_scatter
    inner = 2 if way == "a2a+p2p" else size
    dist.batch_isend_irecv = count(originals[0], hops)
    dist.all_to_all_single = count(originals[1], lambda received, x, *rest: of_members(inner, x))
    # A ring passes on all parts but one of what is gathered; each rank's part is counted once a receiver.
    collectives._all_gather = count(originals[2], lambda whole, x, *rest: bytes_of(whole) - bytes_of(x))
    collectives._reduce_scatter = count(originals[3], lambda part, x, *rest: bytes_of(x) - bytes_of(part))
    try:
        core = core_of(cases()["causal"], way, "auto")
        n = S // size
        heads = (A, groups, groups)
        q, k, v = (torch.randn(n, B, h, D, dtype=torch.bfloat16, requires_grad=True) for h in heads)
        context = core(q, k, v, None, AttnMaskType.causal)
        forward = sent[0]
        context.sum().backward()
    finally:
        (dist.batch_isend_irecv, dist.all_to_all_single, collectives._all_gather, collectives._reduce_scatter) = (
            originals
        )
    return forward, sent[0] - forward


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_layer(size: int, groups: int) -> None:
    n = S // size * B
    queries, keys = 2 * n * A * D, 2 * n * 2 * groups * D  # bytes in bf16; keys stands for keys and values
    wide_keys = keys // 2 * WIDE
    ring = (keys * (size - 1), keys * (size - 1) + wide_keys * size)
    gather = (keys * (size - 1), (keys + wide_keys) * (size - 1))

    def exchange(ranks: int) -> tuple[int, int]:
        """Keys and values of fewer groups than ranks are repeated."""
        heads_sent = 2 * queries + keys * max(1, ranks // groups)
        return (heads_sent * (ranks - 1) // ranks,) * 2

    outer, repeated = size // 2, keys * max(1, 2 // groups)
    nested_ring = (
        repeated * (outer - 1),
        repeated * (outer - 1) + (repeated // 2 * WIDE * outer if outer > 1 else 0),
    )
    nested = tuple(a + b for a, b in zip(exchange(2), nested_ring))
    expected = {"p2p": ring, "all_gather": gather, "a2a": exchange(size), "a2a+p2p": nested}
    for way, numbers in expected.items():
        assert set(run_ranks(size, sent_bytes, size, way, groups)) == {numbers}, way
