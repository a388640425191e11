"""Collectives: under names that are the same in all supported torch versions, known to `activity`, some in flight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.activity import communicating, launched
from megatron.core.utils import divide, get_pg_size

# torch 2.13 renames the two; the old names warn there and the new ones do not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(
    x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: ProcessGroup | None = None, what: str = ""
) -> None:
    """Sum (or `op`) of `x` over the group, in place. `what` says in messages what is reduced."""
    with communicating("all-reduce", group, of=what):
        dist.all_reduce(x, op, group=group)


def all_gather_into_tensor(whole: Tensor, x: Tensor, group: ProcessGroup | None = None, what: str = "") -> None:
    """Every rank's `x`, one after the other, into `whole`."""
    with communicating("all-gather", group, of=what):
        _all_gather(whole, x, group=group)


def reduce_scatter_tensor(part: Tensor, x: Tensor, group: ProcessGroup | None = None, what: str = "") -> None:
    """This rank's part of the sum of `x` over the group into `part`."""
    with communicating("reduce-scatter", group, of=what):
        _reduce_scatter(part, x, group=group)


def all_to_all(
    received: Tensor,
    x: Tensor,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    group: ProcessGroup | None = None,
    what: str = "",
) -> None:
    """Rows of `x` to every rank of the group, the rows from every rank into `received`."""
    with communicating("all-to-all", group, of=what):
        dist.all_to_all_single(received, x, output_splits, input_splits, group=group)


def broadcast(x: Tensor, group_src: int, group: ProcessGroup | None = None, what: str = "") -> None:
    """`x` of the rank `group_src` of the group, on all its ranks."""
    with communicating("broadcast", group, peer=group_src, of=what):
        dist.broadcast(x, group_src=group_src, group=group)


@dataclass(frozen=True)
class InFlight:
    """A collective that has been launched; its result is not to be read before `wait`."""

    result: Tensor
    work: Any
    """None where nothing travels."""
    name: str = "collective"
    group: ProcessGroup | None = None
    what: str = ""
    landed: Callable[[], None] | None = field(init=False, default=None)
    """To be told when it is through."""

    def __post_init__(self) -> None:
        if self.work is not None:
            object.__setattr__(self, "landed", launched(self.name, self.group, of=self.what))

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.work is None or self.work.is_completed()

    def wait(self) -> Tensor:
        """The result, once it has arrived."""
        if self.work is not None:
            with communicating(self.name, self.group, of=self.what):
                self.work.wait()
            if self.landed is not None:
                self.landed()
        return self.result


def start_all_reduce(
    x: Tensor, group: ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, what: str = ""
) -> InFlight:
    """Launch the sum (or `op`) of `x` over the group, in place where `x` is contiguous."""
    x = x.contiguous()
    if get_pg_size(group) == 1:
        return InFlight(x, None)
    return InFlight(x, dist.all_reduce(x, op, group=group, async_op=True), "all-reduce", group, what)


def start_all_gather(x: Tensor, group: ProcessGroup | None, into: Tensor | None = None, what: str = "") -> InFlight:
    """Launch the concatenation of every rank's `x` along the first dimension.

    Args:
        into: where it goes; `x` may be this rank's part of it. A group of one rank leaves it as it is.
    """
    size = get_pg_size(group)
    if size == 1:
        return InFlight(x if into is None else into, None)
    whole = x.new_empty(size * x.size(0), *x.shape[1:]) if into is None else into
    work = _all_gather(whole, x.contiguous(), group=group, async_op=True)
    return InFlight(whole, work, "all-gather", group, what)


def start_reduce_scatter(
    x: Tensor,
    group: ProcessGroup | None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    into: Tensor | None = None,
    what: str = "",
) -> InFlight:
    """Launch the sum (or `op`) of `x` over the group, of which each rank gets its part of the first dimension.

    Args:
        into: where that goes; it may be this rank's part of `x`. A group of one rank leaves it as it is.
    """
    size = get_pg_size(group)
    if size == 1:
        return InFlight(x if into is None else into, None)
    part = x.new_empty(divide(x.size(0), size), *x.shape[1:]) if into is None else into
    work = _reduce_scatter(part, x.contiguous(), op=op, group=group, async_op=True)
    return InFlight(part, work, "reduce-scatter", group, what)


def start_all_to_all(
    x: Tensor,
    group: ProcessGroup | None,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    what: str = "",
) -> InFlight:
    """Launch sending the rows of `x` to every rank of the group; what arrives are the rows from every rank."""
    if get_pg_size(group) == 1:
        return InFlight(x, None)
    x = x.contiguous()
    received = x.new_empty(x.size(0) if output_splits is None else sum(output_splits), *x.shape[1:])
    work = dist.all_to_all_single(received, x, output_splits, input_splits, group=group, async_op=True)
    return InFlight(received, work, "all-to-all", group, what)
