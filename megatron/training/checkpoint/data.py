"""The position of a data iterator that keeps one of its own.

The loaders of this program need none: the number of consumed samples says where they stand. A loader handed in by a
program takes part if it, or what it wraps, has `state_dict()` and `load_state_dict(...)`.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.collective import gather_from_all

DATA_KEY = "train_data_iterator"
_WRAPPERS = ("batches", "iterable")


def stateful_part(iterator: Any) -> Any | None:
    """What of an iterator has a state to save: it or what it wraps; None if nothing."""
    while iterator is not None:
        if hasattr(iterator, "state_dict") and hasattr(iterator, "load_state_dict"):
            return iterator
        iterator = next((getattr(iterator, name) for name in _WRAPPERS if hasattr(iterator, name)), None)
    return None


def sharded_position(iterator: Any) -> ShardedObject | None:
    """The position of this data parallel rank's iterator; None if no rank has one. All ranks call this.

    Iterators are read on the first tensor parallel rank of the first pipeline stage.
    """
    part = stateful_part(iterator)
    state = None if part is None else part.state_dict()
    if not any(gather_from_all(part is not None)):
        return None
    return position_object(state)


def position_object(state: Any) -> ShardedObject:
    """Description of a position; None to load it."""
    ps = parallel_state
    rank, size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    others = (
        ps.get_pipeline_model_parallel_rank(),
        ps.get_tensor_model_parallel_rank(),
        ps.get_context_parallel_rank(),
    )
    return ShardedObject(DATA_KEY, state, (size,), (rank,), replica_id=others)


def restore_position(iterator: Any, state: Any) -> bool:
    """Continue an iterator where it was saved; whether it was possible."""
    part = stateful_part(iterator)
    if part is None or state is None:
        return False
    part.load_state_dict(state)
    return True
