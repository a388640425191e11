"""Values of one rank on others: settings and prompts from the first, scores from the last stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives, parallel_state
from megatron.core.activity import communicating
from megatron.core.device import current_device
from megatron.core.inference import communication_utils
from megatron.core.utils import get_pg_rank, get_pg_size


def _source(rank: int, data_parallel: bool) -> tuple[ProcessGroup | None, int]:
    """(group, rank in it that has the values): all ranks, or with `data_parallel` those of this copy of the model."""
    if data_parallel:
        return parallel_state.get_model_parallel_group(), 0
    return torch.distributed.group.WORLD, rank


def broadcast_tensor(
    size: Sequence[int], dtype: torch.dtype, tensor: Tensor | None = None, rank: int = 0, data_parallel: bool = False
) -> Tensor:
    """The `tensor` of one rank on all. Communicates: a broadcast.

    Args:
        rank: that has it.
        data_parallel: the first rank of each copy of the model has it, for that copy.

    Raises:
        ValueError: it has another size or type.
    """
    group, source = _source(rank, data_parallel)
    if get_pg_rank(group) == source:
        shared = _checked(size, dtype, tensor).to(current_device())
    else:
        shared = torch.empty(tuple(size), dtype=dtype, device=current_device())
    collectives.broadcast(shared, source, group, what="values")
    return shared


def broadcast_int_list(
    size: int, int_list: Sequence[int] | None = None, rank: int = 0, data_parallel: bool = False
) -> Tensor:
    """[size] int64, see `broadcast_tensor`."""
    values = None if int_list is None else torch.tensor(int_list, dtype=torch.int64)
    return broadcast_tensor([size], torch.int64, values, rank, data_parallel)


def broadcast_float_list(
    size: int, float_list: Sequence[float] | None = None, rank: int = 0, data_parallel: bool = False
) -> Tensor:
    """[size] fp32, see `broadcast_tensor`."""
    values = None if float_list is None else torch.tensor(float_list, dtype=torch.float32)
    return broadcast_tensor([size], torch.float32, values, rank, data_parallel)


def broadcast_object(value: Any, rank: int = 0, data_parallel: bool = False) -> Any:
    """The `value` of one rank on all, see `broadcast_tensor`; pickled, among ranks of one run."""
    group, source = _source(rank, data_parallel)
    shared = [value]
    with communicating("broadcast", group, peer=source, of="a call"):
        torch.distributed.broadcast_object_list(shared, group=group, group_src=source)
    return shared[0]


def broadcast_from_last_pipeline_stage(size: Sequence[int], dtype: torch.dtype, tensor: Tensor | None = None) -> Tensor:
    """The last stage's `tensor` on all stages. Communicates: a broadcast over the pipeline group."""
    return communication_utils.broadcast_from_last_pipeline_stage(list(size), dtype, tensor)


def broadcast_from_last_to_first_pipeline_stage(
    size: Sequence[int], dtype: torch.dtype, tensor: Tensor | None = None
) -> Tensor | None:
    """The last stage's `tensor` on the first and the last; None on those between. Communicates: a send."""
    group = parallel_state.get_pipeline_model_parallel_group()
    last, own = parallel_state.stage_placement().last_rank, get_pg_rank(group)
    if own == last:
        tensor = _checked(size, dtype, tensor)
    if get_pg_size(group) == 1 or last == 0 or own not in (0, last):
        return tensor if own == last else None
    if own == last:
        with communicating("send", group, peer=0, of="scores"):
            torch.distributed.send(tensor, group=group, group_dst=0)
        return tensor
    received = torch.empty(tuple(size), dtype=dtype, device=current_device())
    with communicating("receive", group, peer=last, of="scores"):
        torch.distributed.recv(received, group=group, group_src=last)
    return received


def copy_from_last_to_first_pipeline_stage(size: Sequence[int], dtype: torch.dtype, tensor: Tensor) -> None:
    """Write the values of the last stage's `tensor` into that of the first, in place. Communicates: a send."""
    received = broadcast_from_last_to_first_pipeline_stage(size, dtype, tensor)
    if received is not None and received is not tensor:
        tensor.copy_(received)


def _checked(size: Sequence[int], dtype: torch.dtype, tensor: Tensor | None) -> Tensor:
    if tensor is None or list(tensor.shape) != list(size) or tensor.dtype is not dtype:
        found = None if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"the rank whose values are sent has {found}, not {list(size)} of {dtype}")
    return tensor.contiguous()
