"""Saving and loading in files of one's own, whatever their format: every rank writes its shards to a few files, the
first rank the table of contents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..collective import rank_and_size, together
from ..core import CheckpointingException
from ..dict_utils import dict_list_map_outplace, nested_values
from ..durable import FileRecord
from ..mapping import ShardedObject, ShardedStateDict, ShardedTensor, StateDict, is_main_replica
from .async_utils import AsyncRequest
from .background import BackgroundSaver
from .base import AsyncSaveShardedStrategy, LoadShardedStrategy
from .catalog import Catalog, Entry, ObjectEntry, TensorEntry, catalog_of, raise_if_damaged
from .file_plan import FilePlan, plan_files, write_plans
from .reading import plan_load, plan_reads, read_tensors
from .resharding import Shape


class ShardedFilesSaveStrategy(AsyncSaveShardedStrategy):
    """Writes the shards of which this rank has the main replica.

    Args:
        backend, version: format written.
        keep_only_main_replica: always true in effect; copies are never written twice.
        thread_count: files that each rank writes at the same time.
        cached_metadata: accepted for compatibility; the table of contents costs too little to be kept.
        separation_hint: tensors whose name starts so go to files whose name starts so.
    """

    data_suffix: str

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

    @abstractmethod
    def make_file(self, name: str, entries: list[Entry]) -> FilePlan:
        """A file with these entries."""

    @abstractmethod
    def make_catalog_file(self, catalog: Catalog) -> FilePlan:
        """The table of contents."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def plan_sharded(self, sharded_state_dict: ShardedStateDict) -> list[FilePlan]:
        plans: list[FilePlan] = []
        with together("cannot plan the checkpoint"):
            entries = list(local_entries(sharded_state_dict))
            rank, _ = rank_and_size()
            plans = plan_files(entries, rank, self.thread_count, self.make_file, self.data_suffix, self.separation_hint)
        everything = gather_to_first([written for plan in plans for written in plan.written])
        if everything is not None:
            plans.append(self.make_catalog_file(catalog_of(written for part in everything for written in part)))
        return plans

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord]:
        directory = Path(checkpoint_dir)
        plans, records = self.plan_sharded(sharded_state_dict), {}
        with together(f"cannot write {directory}"):
            records = write_plans(plans, directory)
        return records

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        saver = BackgroundSaver()
        staged = saver.stage(self.plan_sharded(sharded_state_dict), Path(checkpoint_dir))
        return AsyncRequest(staged.write, (), [saver.close])


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
            yield ObjectEntry(value.unique_key, value.data)
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


class ShardedFilesLoadStrategy(LoadShardedStrategy):
    """Reads shards of any layout from what any other layout has written."""

    backend: str
    versions: tuple[int, ...] = (1,)

    @abstractmethod
    def read_catalog(self, directory: Path) -> Catalog:
        """The table of contents of a checkpoint."""

    @abstractmethod
    def open_chunk(self, data: memoryview, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
        """A stored chunk as a tensor, a view of its bytes where that is possible."""

    @abstractmethod
    def read_objects(self, objects: Iterable[ShardedObject], catalog: Catalog, directory: Path) -> dict[str, Any]:
        """Unique key -> object."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != self.backend:
            raise CheckpointingException(f"expected a {self.backend} checkpoint, got {loaded_backend}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version not in self.versions:
            raise CheckpointingException(
                f"{self.backend} version {loaded_version} is unknown, expected {' or '.join(map(str, self.versions))}"
            )

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """Read in place into the data of each shard; nothing is changed on any rank if shapes or names do not
        fit."""
        directory = Path(checkpoint_dir)
        values = list(nested_values(sharded_state_dict))
        with together(f"cannot load {directory}"):
            catalog = self.read_catalog(directory)
            plan = plan_load(values, catalog)
            reads = plan_reads(catalog, (target for local in plan.values() for target in local.targets))
            objects = [value for value in values if isinstance(value, ShardedObject)]
            places = [read.chunk.place for read in reads] + catalog.places({o.unique_key for o in objects})
            raise_if_damaged(places, directory)
        with together(f"cannot read {directory}"):
            for local in plan.values():
                if local.zero_first is not None:
                    local.zero_first.detach().zero_()
            read_tensors(reads, catalog, directory, self.open_chunk)
            contents = self.read_objects(objects, catalog, directory)
        return dict_list_map_outplace(
            lambda v: contents[v.unique_key] if isinstance(v, ShardedObject) else v.data, sharded_state_dict
        )

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: Catalog | None = None) -> dict[str, Any]:
        catalog = self.read_catalog(Path(checkpoint_dir)) if metadata is None else metadata
        return {key: whole_tensor(key, stored.global_shape, stored.dtype) for key, stored in catalog.tensors.items()}

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        catalog = self.read_catalog(Path(checkpoint_dir))
        objects = {key: ShardedObject.empty_from_unique_key(key) for key in catalog.objects}
        return {**objects, **self.load_tensors_metadata(checkpoint_dir, catalog)}


def whole_tensor(key: str, shape: Shape, dtype: torch.dtype) -> ShardedTensor:
    """Description of a global tensor as one shard."""
    return ShardedTensor(key, None, dtype, shape, shape, (0,) * len(shape), (1,) * len(shape))
