"""What the flags for overlap say: a communication is launched before the products that it is to hide behind, and
waited for after them. Counted in the program itself, by the order of what a rank does and not by seconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.functional_tests.program import TINY, run_program
from tests.worker_pool import run_ranks

STEPS = 2
SETTINGS = f"--train-iters {STEPS} --attention-dropout 0 --hidden-dropout 0 --ddp-bucket-size 10000"
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce"
PIPELINE = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERTS = """--num-experts 4 --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 24 --disable-bias-linear
    --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")

Hidden = dict[str, list[int]]
"""By what travelled: for each time, the number of matrix products between launch and wait."""


class Products(TorchDispatchMode):
    """Counts the matrix products of this thread."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def products_behind_communication(flags: str) -> Hidden:
    """Trains, and watches all that is in flight."""
    from megatron.core import collectives
    from megatron.core.pipeline_parallel import p2p_transport

    products, hidden, launched = Products(), Hidden(), {}

    def watch(kind: Any, name_of: Any) -> Any:
        init, wait = kind.__init__, kind.wait

        def noted_init(flight: Any, *args: Any, **kwargs: Any) -> None:
            init(flight, *args, **kwargs)
            launched[id(flight)] = products.count

        def noted_wait(flight: Any) -> Any:
            before = launched.pop(id(flight), None)
            if flight.work and before is not None:
                hidden.setdefault(name_of(flight), []).append(products.count - before)
            return wait(flight)

        kind.__init__, kind.wait = noted_init, noted_wait
        return lambda: (setattr(kind, "__init__", init), setattr(kind, "wait", wait))

    undo = [
        watch(collectives.InFlight, lambda flight: flight.what or flight.name),
        watch(p2p_transport.InFlight, lambda flight: "stage to stage"),
    ]
    try:
        with products:
            run_program("pretrain_gpt.py", [*TINY, *SETTINGS.split(), *flags.split()])
    finally:
        for one in undo:
            one()
    return hidden


@pytest.mark.parametrize(
    "what, plain, overlapped",
    [
        ("gradients", "--use-distributed-optimizer", SHARDED),
        ("weights", SHARDED, f"{SHARDED} --overlap-param-gather"),
        ("stage to stage", f"{PIPELINE} --no-overlap-p2p-communication", PIPELINE),
        ("tokens of experts", EXPERTS, f"{EXPERTS} --moe-shared-expert-overlap"),
        ("exchange of pieces", TENSOR, f"{TENSOR} --tp-comm-overlap"),
    ],
)
def test_what_is_in_flight_during_products(what: str, plain: str, overlapped: str) -> None:
    for before, after in zip(trained(plain), trained(overlapped)):
        assert not any(before.get(what, ()))
        hidden = [count for count in after[what] if count]
        # The first step learns in how many parts gradients come, and hides none; the outermost never hide.
        assert len(after[what]) >= 2 * STEPS and len(hidden) >= len(after[what]) // 4


@cache
def trained(flags: str) -> list[Hidden]:
    """What each of two ranks saw."""
    return run_ranks(2, products_behind_communication, flags)
