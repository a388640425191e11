"""Handing a batch from the rank that reads data to the other ranks of its tensor parallel group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import broadcast
from megatron.core.utils import get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none

_MAX_DIM = 5


def broadcast_data(
    keys: Sequence[str],
    data: Mapping[str, Tensor] | None,
    datatype: torch.dtype,
    tp_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """`{key: tensor}` on every rank of the tensor parallel group, read from the first one's `data`.

    Communicates: two broadcasts, the shapes and one flat tensor of all values. Other ranks may pass None as
    `data`.

    Raises:
        ValueError: a tensor is not of `datatype`, or has more than 5 dimensions; on every rank.
    """
    group = get_tensor_model_parallel_group_if_none(tp_group)
    target = device.current_device()
    shapes = _broadcast_shapes(keys, data, datatype, group)
    if get_pg_size(group) == 1:
        assert data is not None
        return {key: data[key].to(target, non_blocking=True) for key in keys}
    numels = [torch.Size(shape).numel() for shape in shapes]
    if get_pg_rank(group) == 0:
        assert data is not None
        flat = torch.cat([data[key].contiguous().view(-1) for key in keys]).to(target)
    else:
        flat = torch.empty(sum(numels), dtype=datatype, device=target)
    broadcast(flat, group_src=0, group=group)
    return {key: part.view(shape) for key, part, shape in zip(keys, flat.split(numels), shapes)}


def _broadcast_shapes(
    keys: Sequence[str], data: Mapping[str, Tensor] | None, datatype: torch.dtype, group: ProcessGroup | None
) -> list[list[int]]:
    """Shape of each key's tensor. The others learn of wrong data, too, for they would wait for it forever."""
    table = torch.zeros(len(keys), _MAX_DIM + 1, dtype=torch.int64)  # per key: number of dims, then the dims
    found = {}
    if get_pg_rank(group) == 0:
        assert data is not None
        for row, key in enumerate(keys):
            shape = data[key].shape
            if data[key].dtype != datatype or len(shape) > _MAX_DIM:
                table[row, 0] = -1
                found[key] = f", not {data[key].dtype} with {len(shape)}"
            else:
                table[row, : len(shape) + 1] = torch.tensor([len(shape), *shape])
    if get_pg_size(group) > 1:
        table = table.to(device.current_device())
        broadcast(table, group_src=0, group=group)
    rows = table.tolist()
    for key, row in zip(keys, rows):
        if row[0] < 0:
            message = f"{key!r} must be {datatype} with at most {_MAX_DIM} dimensions{found.get(key, '')}"
            raise ValueError(message)
    return [row[1 : row[0] + 1] for row in rows]
