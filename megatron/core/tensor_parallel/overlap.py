"""Linear layers under sequence parallelism whose communication hides behind their own matrix products.

The collective next to a product is cut into one piece a rank and passed around a ring: while one piece is
multiplied, the next is on its way (Wang et al., ASPLOS 2023, doi 10.1145/3567955.3567959). What the layer does to
its input and output is what `ColumnParallelLinear` and `RowParallelLinear` do without overlap; sums over ranks are
taken in ring order. s sequence, b microbatch; x and dy are [s/tp, b, ...] where they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import InFlight, start_all_gather, start_reduce_scatter
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.gemm import matmul, matmul_into, weight_gradient
from megatron.core.tensor_parallel.weight_grad_queue import PostponedProduct, postpone
from megatron.core.utils import divide, get_pg_rank, get_pg_size


@dataclass(frozen=True)
class OverlapPlan:
    """Which communication hides behind which product; what is off happens before or after its product."""

    ring_gather: bool
    """All-gathers of x (column-parallel forward) and dy (row-parallel backward), behind their own products."""
    ring_scatter: bool
    """The reduce-scatter of y (row-parallel forward), behind the product that makes y."""
    ring_scatter_dx: bool
    """The reduce-scatter of dx (column-parallel backward), behind the product that makes dx."""
    gather_behind_dx: bool
    """The second all-gather of x (column-parallel backward, for dW), behind the product that makes dx."""
    scatter_behind_dw: bool
    """The reduce-scatter of dx behind the product that makes dW; where dx travels in a ring it has no use."""


def overlap_plan(config: ModelParallelConfig, name: str | None) -> OverlapPlan | None:
    """The plan of the layer `name` (qkv, proj, fc1, fc2); None for layers without overlap."""
    left_out = (config.tp_comm_overlap_disable_qkv and name == "qkv") or (
        config.tp_comm_overlap_disable_fc1 and name == "fc1"
    )
    if not config.tp_comm_overlap or name is None or left_out:
        return None
    return OverlapPlan(
        ring_gather=config.tp_comm_overlap_ag and config.tp_comm_split_ag,
        ring_scatter=config.tp_comm_overlap_rs and config.tp_comm_split_rs,
        ring_scatter_dx=config.tp_comm_overlap_rs_dgrad,
        gather_behind_dx=config.tp_comm_bulk_dgrad,
        scatter_behind_dw=config.tp_comm_bulk_wgrad,
    )


# --- the two rings ---


def _pass_on(x: Tensor, group: ProcessGroup) -> InFlight:
    """Launch: `x` goes to the next rank of the ring, the previous rank's arrives."""
    rank, size = get_pg_rank(group), get_pg_size(group)
    received = torch.empty_like(x)
    operations = [
        dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size),
        dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
    ]
    return InFlight(received, _All(dist.batch_isend_irecv(operations), x), "exchange of pieces", group)


@dataclass(frozen=True)
class _All:
    """Several handles as one; keeps what is being sent alive."""

    works: list[Any]
    sent: Tensor

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def gather_and_multiply(x: Tensor, matrix: Tensor, group: ProcessGroup, whole_x: Tensor | None = None) -> Tensor:
    """X M of the all-gathered X: the piece at hand is multiplied while the next one arrives.

    Args:
        x: this rank's part, [s/tp, b, in].
        matrix: [in, out].
        whole_x: [s, b, in], filled with X on the way.

    Returns:
        [s, b, out].
    """
    rank, size = get_pg_rank(group), get_pg_size(group)
    rows = x.size(0)
    out = x.new_empty(size * rows, *x.shape[1:-1], matrix.size(1))
    piece = x.contiguous()
    for step in range(size):
        owner = (rank - step) % size
        arriving = _pass_on(piece, group) if step < size - 1 else None
        matmul_into(out.narrow(0, owner * rows, rows), piece, matrix)
        if whole_x is not None:
            whole_x.narrow(0, owner * rows, rows).copy_(piece)
        if arriving is not None:
            piece = arriving.wait()
    return out


def multiply_and_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's rows of the sum of X M over the group; a part's running sum travels while the next is multiplied.

    The sum for rank d starts at the rank after d and ends at d, each rank on the way adding its own product.

    Args:
        x: [s, b, in].
        matrix: [in, out].

    Returns:
        [s/tp, b, out].
    """
    rank, size = get_pg_rank(group), get_pg_size(group)
    rows = divide(x.size(0), size)
    arriving: InFlight | None = None
    for step in range(size):
        part = matmul(x.narrow(0, (rank - 1 - step) % size * rows, rows), matrix)
        if arriving is not None:
            part.add_(arriving.wait())
        if step < size - 1:
            arriving = _pass_on(part, group)
    return part


# --- the two layers ---


class ColumnParallelOverlap(torch.autograd.Function):
    """x Wᵀ of the all-gathered x; backward all-gathers x again for dW and reduce-scatters dx."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, accumulate: bool, plan: OverlapPlan, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.accumulate, ctx.plan, ctx.group = weight, accumulate, plan, group
        if plan.ring_gather:
            return gather_and_multiply(x, weight.t(), group)
        return matmul(start_all_gather(x, group).wait(), weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        plan, (needs_dx, needs_dw) = ctx.plan, ctx.needs_input_grad[:2]
        if needs_dw:
            needs_dw = not postpone(PostponedProduct(ctx.weight, dy, x, ctx.group, ctx.accumulate))
        whole_x = start_all_gather(x, ctx.group) if needs_dw else InFlight(x, None)
        if not plan.gather_behind_dx:
            whole_x.wait()
        dx = InFlight(dy, None)
        if needs_dx and plan.ring_scatter_dx:
            dx = InFlight(multiply_and_reduce_scatter(dy, weight, ctx.group), None)
        elif needs_dx:
            dx = start_reduce_scatter(matmul(dy, weight), ctx.group)
            if not plan.scatter_behind_dw:
                dx.wait()
        dw = weight_gradient(ctx.weight, dy, whole_x.wait(), ctx.accumulate) if needs_dw else None
        return dx.wait() if needs_dx else None, dw, None, None, None


class RowParallelOverlap(torch.autograd.Function):
    """x Wᵀ, reduce-scattered along the sequence; backward all-gathers dy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, accumulate: bool, plan: OverlapPlan, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.accumulate, ctx.plan, ctx.group = weight, accumulate, plan, group
        if plan.ring_scatter:
            return multiply_and_reduce_scatter(x, weight.t(), group)
        return start_reduce_scatter(matmul(x, weight.t()), group).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.plan.ring_gather:
            whole_dy = dy.new_empty(x.size(0), *dy.shape[1:])
            dx = gather_and_multiply(dy, weight, ctx.group, whole_dy)
        else:
            whole_dy = start_all_gather(dy, ctx.group).wait()
            dx = matmul(whole_dy, weight)
        dw, product = None, PostponedProduct(ctx.weight, whole_dy, x, None, ctx.accumulate)
        if ctx.needs_input_grad[1] and not postpone(product):
            dw = weight_gradient(ctx.weight, whole_dy, x, ctx.accumulate)
        return dx, dw, None, None, None
