"""`_extra_state` of linear layers: the scales of fp8, and empty entries that other Megatron-Core releases ask for.

Other releases keep scales of their own kind there and fail to load a checkpoint without an entry for each layer.
Empty ones are written for those readers; a load here asks only for those of layers that have scales, and does without
where there are none.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

_LINEAR = re.compile(r"(.*\.layers\.(?!.*\.experts\.).*\.linear_\w+)\.weight")


def empty_extra_states(model_state: dict[str, Any]) -> list[ShardedObject]:
    """An empty object for each linear layer of a sharded state dict that has no state of its own."""
    own = {value.unique_key for value in nested_values(model_state) if isinstance(value, ShardedObject)}
    empty = [
        _extra_state(match[1], value)
        for value in nested_values(model_state)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and (match := _LINEAR.fullmatch(value.key))
    ]
    return [state for state in empty if state.unique_key not in own]


def leave_out_new_states(model_request: dict[str, Any], stored: Container[str]) -> None:
    """Drop states of layers from a request that the checkpoint lacks, as one of a run without fp8 does: they start
    anew."""
    for chunk in model_request.values():
        lacking = [
            name
            for name, value in chunk.items()
            if isinstance(value, ShardedObject) and name.endswith("._extra_state") and value.unique_key not in stored
        ]
        for name in lacking:
            del chunk[name]


def _extra_state(layer: str, weight: ShardedTensor | ShardedTensorFactory) -> ShardedObject:
    """Of a stack of layers under one name, the cell of this one; else the only one."""
    part = weight if isinstance(weight, ShardedTensor) else next(iter(nested_values(weight.build())))
    depth = part.prepend_axis_num
    # not of the weight, which may be split over the data parallel ranks
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replica = (0, parallel_state.get_tensor_model_parallel_rank(), data_rank)
    grid, cell = (part.global_shape[:depth], part.global_offset[:depth]) if depth else ((1,), (0,))
    return ShardedObject(f"{layer}._extra_state", None, grid, cell, replica_id=replica)
