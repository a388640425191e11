"""Transfers between pipeline ranks in flight: posted together, waited for one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.model_parallel_config import ModelParallelConfig

Shape = Sequence[int] | torch.Size


@dataclass(frozen=True)
class Send:
    """A tensor for the rank `peer` of the group."""

    tensor: Tensor
    peer: int


@dataclass(frozen=True)
class Receive:
    """What the rank `peer` of the group sends; with `config.variable_seq_lengths` its shape is asked for."""

    shape: Shape
    peer: int


@dataclass
class InFlight:
    """A transfer that has been posted."""

    tensor: Tensor
    """What is sent, kept until it has left, or the buffer that is being filled; that one requires gradients."""
    work: list[Any] = field(default_factory=list)
    landed: Callable[[], None] | None = None
    """To be told when it is through."""

    def wait(self) -> Tensor:
        """The tensor, once it has left or arrived."""
        for work in self.work:
            work.wait()
        self.work = []
        if self.landed is not None:
            self.landed()
        return self.tensor


def post(transfers: Sequence[Send | Receive], config: ModelParallelConfig, group: ProcessGroup) -> list[InFlight]:
    """Start these transfers, in one batch with `config.batch_p2p_comm`, else one by one in this order.

    Between two ranks, transports match what they post in order; a transport that does not batch needs the same order
    of sends and receives on both sides.
    """
    dtype = _pipeline_dtype(config)
    if config.variable_seq_lengths:
        transfers = _with_found_shapes(transfers, group)
    where = device.current_device()
    flights = [
        InFlight(
            t.tensor.detach().contiguous()
            if isinstance(t, Send)
            else torch.empty(tuple(t.shape), dtype=dtype, device=where, requires_grad=True)
        )
        for t in transfers
    ]
    ops = [
        dist.P2POp(
            dist.isend if isinstance(t, Send) else dist.irecv, flight.tensor.data, group=group, group_peer=t.peer
        )
        for t, flight in zip(transfers, flights)
    ]
    if config.batch_p2p_comm:
        works = dist.batch_isend_irecv(ops) if ops else []
        one_for_each = len(works) == len(ops)  # gloo; NCCL has one for the whole batch
        for i, flight in enumerate(flights):
            flight.work = [works[i]] if one_for_each else list(works)
    else:
        for op, flight in zip(ops, flights):
            flight.work = [op.op(op.tensor, op.peer, group)]
    return flights


def _pipeline_dtype(config: ModelParallelConfig) -> torch.dtype:
    if config.pipeline_dtype is None:
        raise ValueError("pipeline_dtype must be set when pipeline_model_parallel_size > 1")
    return torch.float32 if getattr(config, "fp32_residual_connection", False) else config.pipeline_dtype


def _with_found_shapes(transfers: Sequence[Send | Receive], group: ProcessGroup) -> list[Send | Receive]:
    """The same transfers with the shapes that the senders have, after telling the receivers one's own."""
    where = device.current_device()
    shapes = [
        torch.tensor(t.tensor.shape, dtype=torch.int64, device=where)
        if isinstance(t, Send)
        else torch.empty(3, dtype=torch.int64, device=where)
        for t in transfers
    ]
    ops = [
        dist.P2POp(dist.isend if isinstance(t, Send) else dist.irecv, shape, group=group, group_peer=t.peer)
        for t, shape in zip(transfers, shapes)
    ]
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
    return [t if isinstance(t, Send) else Receive(tuple(shape.tolist()), t.peer) for t, shape in zip(transfers, shapes)]
