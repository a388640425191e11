"""The rows of each parameter that a rank keeps under torch's fully sharded data parallelism.

`fully_shard` cuts the first dimension of a parameter (already cut by tensor parallelism) over the data parallel ranks:
the first ones get ceil(rows / ranks) rows, the last ones fewer or none. What is done with parameters outside of
forward and backward (initial values, the optimizer's update, checkpoints) is done with these rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)


@dataclass(eq=False)
class ParamRows:
    """Rows `[first_row, first_row + len(local))` of a parameter of shape [rows, ...]."""

    name: str
    param: Parameter
    """A DTensor with the attributes that the layer gave its parameter."""
    local: Tensor
    """[own rows, ...], the storage of `param`; the same object for the life of the wrapper."""
    first_row: int

    @property
    def first_element(self) -> int:
        """Where `local` begins in the flattened parameter."""
        return self.first_row * (self.param.numel() // max(self.param.size(0), 1))


def own_rows(module: nn.Module) -> list[ParamRows]:
    """Of every trainable or frozen parameter that `fully_shard` has cut, what this rank keeps."""
    rows = []
    for name, param in module.named_parameters():
        assert isinstance(param, DTensor), f"{name} is not sharded"
        mesh = param.device_mesh
        share = -(-param.size(0) // mesh.size())
        local = param.to_local().detach()
        rows.append(ParamRows(name, param, local, min(mesh.get_local_rank() * share, param.size(0))))
    return rows


def describe_rows(sharded_state_dict: ShardedStateDict, rows: list[ParamRows]) -> ShardedStateDict:
    """The model's own description of its whole parameters, as boxes of this rank's rows.

    A checkpoint of them has the same tensors as one without sharding.
    """
    by_param = {id(one.param): one for one in rows}

    def describe(value: Any) -> Any:
        if not isinstance(value, (ShardedTensor, ShardedTensorFactory)) or not isinstance(value.data, DTensor):
            return value
        own = by_param[id(value.data)]
        return _box_of(value, own) if isinstance(value, ShardedTensor) else _boxes_of(value, own)

    return dict_list_map_outplace(describe, sharded_state_dict)


def _box_of(whole: ShardedTensor, own: ParamRows) -> ShardedTensor:
    return _rows_of_box(replace(whole, data=None), own.local, own.first_row)


def _rows_of_box(whole: ShardedTensor, data: Tensor, first_row: int) -> ShardedTensor:
    """Rows `first_row` and up of the box `whole`, which hold `data`. A box of no rows is nobody's main copy."""
    axis = whole.prepend_axis_num
    offset = list(whole.global_offset)
    offset[axis] += first_row
    replica = whole.replica_id
    assert isinstance(replica, tuple)
    return replace(
        whole,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        flattened_range=None,
        replica_id=(*replica[:-1], 0 if data.numel() else 1),
    )


def _boxes_of(factory: ShardedTensorFactory, own: ParamRows) -> ShardedTensorFactory:
    """Own rows of a tensor that is stored in parts. The factory is asked for the ranges of the parts they cover."""
    inner, whole = factory.build_fn, own.param.shape
    first = own.first_element

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
        flat = data.reshape(-1)
        parts = inner(key, flat, replica_id, slice(first, first + flat.numel()))
        return dict_list_map_outplace(as_rows, parts)

    def as_rows(part: ShardedTensor) -> ShardedTensor:
        assert part.flattened_range is not None and part.data is not None
        width = max(torch.Size(part.local_shape[1:]).numel(), 1)
        first_row = part.flattened_range.start // width
        data = part.data.view(-1, *part.local_shape[1:])
        return _rows_of_box(replace(part, data=None, flattened_range=None), data, first_row)

    def merge(parts: Any) -> Tensor:
        return factory.merge_fn(parts) if parts else torch.empty(0, *whole[1:], dtype=own.local.dtype)

    return replace(factory, data=own.local, build_fn=build, merge_fn=merge)


def rows_with_values(
    rows: list[ParamRows], state_dict: dict[str, Any], strict: bool
) -> Iterator[tuple[ParamRows, Tensor]]:
    """Each parameter's rows with the values for them, which may come whole.

    Raises:
        KeyError: a parameter has none, and `strict` is set.
        ValueError: they have another shape.
    """
    for one in rows:
        if one.name not in state_dict:
            if strict:
                raise KeyError(f"{one.name} is missing from the state dict")
            continue
        value = state_dict[one.name]
        value = value.to_local() if isinstance(value, DTensor) else value
        if value.shape == one.param.shape != one.local.shape:
            value = value[one.first_row : one.first_row + len(one.local)]
        if value.shape != one.local.shape:
            raise ValueError(
                f"{one.name} has shape {tuple(value.shape)} in the state dict; this rank keeps {tuple(one.local.shape)}"
            )
        yield one, value
