"""Collectives whose names differ between the torch versions that are supported, and collectives in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.utils import divide, get_pg_size

# torch 2.13 renames the two; the old names warn there and the new ones do not exist before.
all_gather_into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class InFlight:
    """A collective that has been launched; its result is not to be read before `wait`."""

    result: Tensor
    work: Any
    """None where nothing travels."""

    def wait(self) -> Tensor:
        """The result, once it has arrived."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_reduce(x: Tensor, group: ProcessGroup | None) -> InFlight:
    """Launch the sum of `x` over the group, in place where `x` is contiguous."""
    x = x.contiguous()
    return InFlight(x, dist.all_reduce(x, group=group, async_op=True) if get_pg_size(group) > 1 else None)


def start_all_gather(x: Tensor, group: ProcessGroup | None) -> InFlight:
    """Launch the concatenation of every rank's `x` along the first dimension."""
    size = get_pg_size(group)
    if size == 1:
        return InFlight(x, None)
    whole = x.new_empty(size * x.size(0), *x.shape[1:])
    return InFlight(whole, all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=True))


def start_reduce_scatter(x: Tensor, group: ProcessGroup | None) -> InFlight:
    """Launch the sum of `x` over the group, of which each rank gets its part of the first dimension."""
    size = get_pg_size(group)
    if size == 1:
        return InFlight(x, None)
    part = x.new_empty(divide(x.size(0), size), *x.shape[1:])
    return InFlight(part, reduce_scatter_tensor(part, x.contiguous(), group=group, async_op=True))
