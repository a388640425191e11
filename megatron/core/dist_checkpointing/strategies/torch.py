"""The `torch_dist` format: every rank writes its shards to files of its own, the first rank the table of
contents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from ..collective import rank_and_size, together
from ..core import CheckpointingException
from ..dict_utils import dict_list_map_outplace, nested_values
from ..mapping import ShardedBase, ShardedObject, ShardedStateDict, ShardedTensor, StateDict, is_main_replica
from .base import LoadShardedStrategy, SaveShardedStrategy, StrategyAction, register_default_strategy
from .resharding import LocalRead, Shape, plan_local_read
from .torch_files import (
    METADATA_FNAME,
    Entry,
    ObjectEntry,
    TensorEntry,
    Written,
    build_metadata,
    find_damage,
    finish_reads,
    global_shape_of,
    original_shape,
    pickle_object,
    plan_reads,
    read_metadata,
    read_objects,
    read_tensors,
    write_entries,
    write_metadata,
)


@dataclass(frozen=True)
class MCoreSavePlan(SavePlan):
    """DCP save plan that also carries the original shapes of flattened tensors; part of the format's public
    names."""

    mcore_data: dict[str, dict[str, Any]] | None = field(default=None)


class TorchDistSaveShardedStrategy(SaveShardedStrategy):
    """Writes the shards of which this rank has the main replica.

    Args:
        backend, version: format written.
        keep_only_main_replica: always true in effect; copies are never written twice.
        thread_count: files that each rank writes at the same time.
        cached_metadata: accepted for compatibility; metadata is rebuilt in every save.
        separation_hint: tensors whose name starts so go to files whose name starts so.
    """

    def __init__(
        self,
        backend: str,
        version: int,
        keep_only_main_replica: bool = True,
        thread_count: int = 2,
        cached_metadata: bool = False,
        separation_hint: str | None = None,
    ) -> None:
        super().__init__(backend, version)
        if not keep_only_main_replica:
            raise NotImplementedError("keep_only_main_replica=False: only one copy of a shard can be written")
        self.thread_count = thread_count
        self.separation_hint = separation_hint

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        directory = Path(checkpoint_dir)
        written: list[Written] = []
        with together(f"cannot write {directory}"):
            entries = list(local_entries(sharded_state_dict))
            rank, _ = rank_and_size()
            written = write_entries(entries, directory, rank, self.thread_count, self.separation_hint)
        all_written = gather_to_first(written)
        with together(f"cannot write {directory / METADATA_FNAME}"):
            if all_written is not None:
                write_metadata(build_metadata(w for part in all_written for w in part), directory)


def gather_to_first(value: Any) -> list[Any] | None:
    """The values of all ranks, on the first rank; None elsewhere."""
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def local_entries(sharded_state_dict: ShardedStateDict) -> Iterator[Entry]:
    """What this rank writes: its main replicas. Empty shards are left out."""
    for value in nested_values(sharded_state_dict):
        if not isinstance(value, (ShardedTensor, ShardedObject)):
            raise CheckpointingException(f"cannot write a {type(value).__name__} as sharded state")
        if not is_main_replica(value.replica_id):
            continue
        if isinstance(value, ShardedObject):
            yield ObjectEntry(value.unique_key, pickle_object(value.data))
        elif prod(value.data_shape):
            yield tensor_entry(value)


def tensor_entry(tensor: ShardedTensor) -> TensorEntry:
    """How a shard is stored: as a box, or as a range of a cell if it is flattened."""
    if tensor.data is None:
        raise CheckpointingException(f"{tensor.key} has no data to write")
    if tensor.flattened_range is None:
        box, shape, original = tuple(tensor.global_offset), tuple(tensor.global_shape), None
        return TensorEntry(tensor.key, box, tensor.shape_in_global, shape, original, tensor.dtype, tensor.data)
    start, stop = tensor.flattened_range.start, tensor.flattened_range.stop
    grid, cell = tensor.max_allowed_chunks(), tensor.local_chunk_offset_in_global()
    return TensorEntry(
        tensor.key,
        (*cell, start),
        (1,) * len(cell) + (stop - start,),
        (*grid, prod(tensor.local_shape)),
        tuple(tensor.global_shape),
        tensor.dtype,
        tensor.data,
    )


class TorchDistLoadShardedStrategy(LoadShardedStrategy):
    """Reads shards of any layout from what any other layout has written."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointingException(f"expected a torch_dist checkpoint, got {loaded_backend}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != 1:
            raise CheckpointingException(f"torch_dist version {loaded_version} is unknown, expected 1")

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """Read in place into the data of each shard; nothing is changed on any rank if shapes or names do not
        fit."""
        directory = Path(checkpoint_dir)
        values = list(nested_values(sharded_state_dict))
        with together(f"cannot load {directory}"):
            metadata = read_metadata(directory)
            plan = plan_load(values, metadata)
            reads = plan_reads(metadata, [target for local in plan.values() for target in local.targets])
            objects = [value for value in values if isinstance(value, ShardedObject)]
            stored = [item.storage_index for item, _ in reads] + [MetadataIndex(o.unique_key) for o in objects]
            raise_if_damaged(metadata, directory, stored)
        with together(f"cannot read {directory}"):
            for local in plan.values():
                if local.zero_first is not None:
                    local.zero_first.detach().zero_()
            read_tensors(reads, metadata, directory)
            finish_reads(plan.values())
            contents = read_objects(objects, metadata, directory)
        return dict_list_map_outplace(
            lambda v: contents[v.unique_key] if isinstance(v, ShardedObject) else v.data, sharded_state_dict
        )

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: Metadata | None = None) -> dict[str, Any]:
        content = read_metadata(Path(checkpoint_dir)) if metadata is None else metadata
        return {
            key: whole_tensor(key, global_shape_of(content, key), stored.properties.dtype)
            for key, stored in content.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        metadata = read_metadata(Path(checkpoint_dir))
        objects = {
            key: ShardedObject.empty_from_unique_key(key)
            for key, stored in metadata.state_dict_metadata.items()
            if not isinstance(stored, TensorStorageMetadata)
        }
        return {**objects, **self.load_tensors_metadata(checkpoint_dir, metadata)}

    def remove_sharded_tensors(self, checkpoint_dir: str | Path, key_prefix: str) -> None:
        """Drop entries from the table of contents, and files that hold nothing else. Not a collective
        call."""
        directory = Path(checkpoint_dir)
        metadata = read_metadata(directory)
        keep = {k: v for k, v in metadata.state_dict_metadata.items() if not k.startswith(key_prefix)}
        places = {i: p for i, p in metadata.storage_data.items() if not i.fqn.startswith(key_prefix)}
        unused = {p.relative_path for p in metadata.storage_data.values()}
        unused -= {p.relative_path for p in places.values()}
        metadata.state_dict_metadata, metadata.storage_data = keep, places
        write_metadata(metadata, directory)
        for name in unused:
            os.remove(directory / name)


def raise_if_damaged(metadata: Metadata, directory: Path, indices: list[Any] | None = None) -> None:
    """Raise if files are missing or truncated."""
    problems = find_damage(metadata, directory, indices)
    if problems:
        raise CheckpointingException("\n".join(problems))


def plan_load(values: list[ShardedBase], metadata: Metadata) -> dict[int, LocalRead]:
    """Position in `values` -> how that tensor is filled. Raises with every name and shape that does not
    fit."""
    plan: dict[int, LocalRead] = {}
    problems: list[str] = []
    for number, value in enumerate(values):
        key = value.unique_key if isinstance(value, ShardedObject) else value.key
        stored = metadata.state_dict_metadata.get(key)
        if stored is None:
            problems.append(f"{key}: not in the checkpoint")
        elif isinstance(value, ShardedTensor):
            if not isinstance(stored, TensorStorageMetadata):
                problems.append(f"{key}: an object in the checkpoint, a tensor expected")
                continue
            value.init_data("cpu")
            try:
                plan[number] = plan_local_read(value, tuple(stored.size), original_shape(metadata, key))
            except CheckpointingException as error:
                problems.append(str(error))
    if problems:
        raise CheckpointingException("the state does not fit the checkpoint:\n  " + "\n  ".join(sorted(set(problems))))
    return plan


def whole_tensor(key: str, shape: Shape, dtype: torch.dtype) -> ShardedTensor:
    """Description of a global tensor as one shard."""
    return ShardedTensor(key, None, dtype, shape, shape, (0,) * len(shape), (1,) * len(shape))


def _get_filesystem_reader(checkpoint_dir: str | Path, cache_metadata: bool = False) -> FileSystemReader:
    """DCP reader of the checkpoint's files, which unpickles nothing but the classes that metadata consists
    of."""

    class SafeReader(FileSystemReader):
        _metadata: Metadata | None = None

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            if self._metadata is None or not cache_metadata:
                self._metadata = read_metadata(Path(checkpoint_dir))
            return self._metadata

    return SafeReader(checkpoint_dir)


register_default_strategy(StrategyAction.SAVE_SHARDED, "torch_dist", 1, TorchDistSaveShardedStrategy("torch_dist", 1))
register_default_strategy(StrategyAction.LOAD_SHARDED, "torch_dist", 1, TorchDistLoadShardedStrategy())
