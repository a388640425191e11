"""Work on replicated shards is spread over the ranks that hold them, instead of falling to the first of
them."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..collective import gather_from_all, rank_and_size
from ..dict_utils import dict_list_map_outplace, extract_matching_values, merge, nested_values
from ..durable import FileRecord
from ..mapping import ReplicaId, ShardedStateDict, ShardedTensor, StateDict, is_main_replica
from .async_utils import AsyncRequest
from .base import AsyncSaveShardedStrategy, LoadShardedStrategy, SaveShardedStrategy
from .file_plan import FilePlan

ShardId = tuple[str, tuple[int, ...], tuple[int, int] | None]


class ShardDistribution(NamedTuple):
    """Which rank of a group writes a shard."""

    main_rank_for_shard: dict[ShardId, int]
    shards_in_this_group: set[ShardId]
    """Shards whose main replica is in the group; the others are written by another group."""


class FullyParallelSaveStrategyWrapper(AsyncSaveShardedStrategy):
    """Lets each rank of a group write an equal part of the state that the group's ranks have in common.

    Args:
        strategy: does the writing.
        parallelization_group: ranks that share the work, usually the data parallel group; None is all ranks.
        do_cache_distribution: keep the assignment of the first save for all later ones (the shards must not
            change).
    """

    def __init__(
        self,
        strategy: SaveShardedStrategy,
        parallelization_group: dist.ProcessGroup | None = None,
        do_cache_distribution: bool = False,
    ) -> None:
        super().__init__(strategy.backend, strategy.version)
        self.base_strategy = strategy
        self.parallelization_group = parallelization_group
        self.do_cache_distribution = do_cache_distribution
        self.cached_distribution: ShardDistribution | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        return self.base_strategy.can_handle_sharded_objects

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord] | None:
        self.apply_saving_parallelization(sharded_state_dict)
        return self.base_strategy.save(sharded_state_dict, checkpoint_dir)

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        if not isinstance(self.base_strategy, AsyncSaveShardedStrategy):
            raise NotImplementedError(f"{type(self.base_strategy).__name__} cannot write in the background")
        self.apply_saving_parallelization(sharded_state_dict)
        return self.base_strategy.async_save(sharded_state_dict, checkpoint_dir)

    def plan_sharded(self, sharded_state_dict: ShardedStateDict) -> list[FilePlan] | None:
        self.apply_saving_parallelization(sharded_state_dict)
        return self.base_strategy.plan_sharded(sharded_state_dict)

    def own_files(self, directory: Path) -> list[Path]:
        return self.base_strategy.own_files(directory)

    def apply_saving_parallelization(self, sharded_state_dict: ShardedStateDict) -> None:
        """Change the replica numbers, in place, so that the main replicas are spread over the group."""
        distribution = self.cached_distribution
        if distribution is None:
            distribution = distribute_shards(sharded_state_dict, self.parallelization_group)
        if self.do_cache_distribution:
            self.cached_distribution = distribution
        distribute_main_replicas_with_precomputed_distribution(
            sharded_state_dict, self.parallelization_group, distribution
        )


def shard_id(tensor: ShardedTensor) -> ShardId:
    """What all replicas of a shard have in common."""
    flat = tensor.flattened_range
    return tensor.key, tuple(tensor.global_offset), None if flat is None else (flat.start, flat.stop)


def distribute_shards(
    sharded_state_dict: ShardedStateDict, group: dist.ProcessGroup | None, main_only: bool = True
) -> ShardDistribution:
    """An even assignment, the same on all ranks of `group`. Communicates names and sizes only.

    Largest shards first, each to the least loaded of the ranks that hold it. With `main_only` shards whose
    main replica is in another group are left to that group.
    """
    local = [
        (shard_id(t), prod(t.data_shape) * t.dtype.itemsize, is_main_replica(t.replica_id))
        for t in nested_values(sharded_state_dict)
        if isinstance(t, ShardedTensor)
    ]
    sizes: dict[ShardId, int] = {}
    holders: dict[ShardId, list[int]] = defaultdict(list)
    ours: set[ShardId] = set()
    for rank, shards in enumerate(gather_from_all(local, group)):
        for name, size, is_main in shards:
            sizes[name] = size
            holders[name].append(rank)
            if is_main or not main_only:
                ours.add(name)
    load: dict[int, int] = defaultdict(int)
    writers: dict[ShardId, int] = {}
    for name in sorted(ours, key=lambda n: (-sizes[n], repr(n))):
        rank = min(holders[name], key=lambda r: (load[r], r))
        writers[name] = rank
        load[rank] += sizes[name]
    return ShardDistribution(writers, ours)


def distribute_main_replicas_with_precomputed_distribution(
    sharded_state_dict: ShardedStateDict,
    parallelization_group: dist.ProcessGroup | None,
    precomputed_distribution: ShardDistribution | None,
) -> None:
    """Make a rank's copy the main replica where `precomputed_distribution` says so, and only there; in place.

    Shards whose main replica is in no rank of the group stay replicas.
    """
    rank, size = rank_and_size(parallelization_group)
    if size == 1 or precomputed_distribution is None:
        return
    taken: set[ShardId] = set()  # a rank may hold one shard twice, such as a tied weight
    for tensor in nested_values(sharded_state_dict):
        if isinstance(tensor, ShardedTensor):
            name = shard_id(tensor)
            chosen = precomputed_distribution.main_rank_for_shard.get(name) == rank and name not in taken
            if chosen:
                taken.add(name)
            tensor.replica_id = as_replica(tensor.replica_id, is_main=chosen)


def as_replica(replica_id: ReplicaId, is_main: bool) -> ReplicaId:
    """A replica number of the same form that is, or is not, the main one."""
    if isinstance(replica_id, int):
        return 0 if is_main else max(1, replica_id)
    if is_main:
        return (0,) * len(replica_id)
    return replica_id if not is_main_replica(replica_id) else (*replica_id[:-1], 1)


class FullyParallelLoadStrategyWrapper(LoadShardedStrategy):
    """Lets each rank of a group read a part of what the group's ranks have in common, and broadcast it to the
    others.

    Args:
        strategy: does the reading.
        parallelization_group: ranks that share the work, usually the data parallel group; None is all ranks.
        do_cache_distribution: keep the assignment of the first load for all later ones.
        exchange_algo: `broadcast` is the only one.
    """

    def __init__(
        self,
        strategy: LoadShardedStrategy,
        parallelization_group: dist.ProcessGroup | None = None,
        do_cache_distribution: bool = False,
        exchange_algo: str = "broadcast",
    ) -> None:
        if exchange_algo != "broadcast":
            raise NotImplementedError(f"exchange_algo {exchange_algo!r} is not available, use 'broadcast'")
        self.base_strategy = strategy
        self.parallelization_group = parallelization_group
        self.do_cache_distribution = do_cache_distribution
        self.cached_distribution: ShardDistribution | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        return self.base_strategy.can_handle_sharded_objects

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        self.base_strategy.check_backend_compatibility(loaded_backend)

    def check_version_compatibility(self, loaded_version: int) -> None:
        self.base_strategy.check_version_compatibility(loaded_version)

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedStateDict]:
        return self.base_strategy.load_tensors_metadata(checkpoint_dir)

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedStateDict]:
        return self.base_strategy.load_sharded_metadata(checkpoint_dir)

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        distribution = self.apply_loading_parallelization(sharded_state_dict)
        if distribution is None:
            return self.base_strategy.load(sharded_state_dict, checkpoint_dir)
        rank, _ = rank_and_size(self.parallelization_group)
        others, own = extract_matching_values(
            sharded_state_dict,
            lambda v: isinstance(v, ShardedTensor) and distribution.main_rank_for_shard[shard_id(v)] != rank,
            return_lists_as_dicts=True,
        )
        for tensor in nested_values(sharded_state_dict):
            if isinstance(tensor, ShardedTensor):
                tensor.init_data("cpu")
        assert isinstance(own, dict)
        loaded = self.base_strategy.load(own, checkpoint_dir)
        exchange_shards(sharded_state_dict, distribution, self.parallelization_group)
        merge(loaded, dict_list_map_outplace(lambda tensor: tensor.data, others))
        return loaded

    def apply_loading_parallelization(self, sharded_state_dict: ShardedStateDict) -> ShardDistribution | None:
        """Who reads what; None if there is nobody to share the work with."""
        if rank_and_size(self.parallelization_group)[1] == 1:
            return None
        distribution = self.cached_distribution
        if distribution is None:
            distribution = distribute_shards(sharded_state_dict, self.parallelization_group, main_only=False)
        if self.do_cache_distribution:
            self.cached_distribution = distribution
        return distribution


def exchange_shards(
    sharded_state_dict: ShardedStateDict, distribution: ShardDistribution, group: dist.ProcessGroup | None
) -> None:
    """Broadcast each shard that several ranks hold from the one that has read it, into the others' data."""
    local: dict[ShardId, list[torch.Tensor]] = defaultdict(list)
    for tensor in nested_values(sharded_state_dict):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            local[shard_id(tensor)].append(tensor.data.detach())
    held = gather_from_all({name: (tuple(t[0].shape), t[0].dtype) for name, t in local.items()}, group)
    where = next((t[0].device for t in local.values()), torch.device("cpu"))
    for name in sorted(distribution.main_rank_for_shard, key=repr):
        holders = [rank for rank, names in enumerate(held) if name in names]
        if len(holders) < 2:
            continue
        reader = distribution.main_rank_for_shard[name]
        shape, dtype = held[reader][name]
        copies = local.get(name, [])
        buffer = copies[0].contiguous() if copies else torch.empty(shape, dtype=dtype, device=where)
        dist.broadcast(buffer, reader if group is None else dist.get_global_rank(group, reader), group=group)
        for copy in copies:
            if copy.data_ptr() != buffer.data_ptr():
                copy.copy_(buffer)
