"""Empty entries that other Megatron-Core releases ask for: `_extra_state` of each linear layer, which here has none.

Other releases keep the scales of fp8 there and fail to load a checkpoint without them. They are written for those
readers; a load here never asks for them.
"""

from __future__ import annotations

import re
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

_LINEAR = re.compile(r"(.*\.layers\.(?!.*\.experts\.).*\.linear_\w+)\.weight")


def empty_extra_states(model_state: dict[str, Any]) -> list[ShardedObject]:
    """An empty object for each linear layer of a sharded state dict."""
    return [
        _extra_state(match[1], value)
        for value in nested_values(model_state)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and (match := _LINEAR.fullmatch(value.key))
    ]


def _extra_state(layer: str, weight: ShardedTensor | ShardedTensorFactory) -> ShardedObject:
    """Of a stack of layers under one name, the cell of this one; else the only one."""
    part = weight if isinstance(weight, ShardedTensor) else next(iter(nested_values(weight.build())))
    depth = part.prepend_axis_num
    # not of the weight, which may be split over the data parallel ranks
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    replica = (0, parallel_state.get_tensor_model_parallel_rank(), data_rank)
    grid, cell = (part.global_shape[:depth], part.global_offset[:depth]) if depth else ((1,), (0,))
    return ShardedObject(f"{layer}._extra_state", None, grid, cell, replica_id=replica)
