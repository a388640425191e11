"""Work on replicated shards is spread over the ranks that hold them, instead of falling to the first of
them."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ..collective import gather_from_all, rank_and_size
from ..dict_utils import nested_values
from ..mapping import ReplicaId, ShardedStateDict, ShardedTensor, is_main_replica
from .base import SaveShardedStrategy

ShardId = tuple[str, tuple[int, ...], tuple[int, int] | None]


class ShardDistribution(NamedTuple):
    """Which rank of a group writes a shard."""

    main_rank_for_shard: dict[ShardId, int]
    shards_in_this_group: set[ShardId]
    """Shards whose main replica is in the group; the others are written by another group."""


class FullyParallelSaveStrategyWrapper(SaveShardedStrategy):
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

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        self.apply_saving_parallelization(sharded_state_dict)
        self.base_strategy.save(sharded_state_dict, checkpoint_dir)

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
    sharded_state_dict: ShardedStateDict, group: dist.ProcessGroup | None
) -> ShardDistribution:
    """An even assignment, the same on all ranks of `group`. Communicates names and sizes only.

    Largest shards first, each to the least loaded of the ranks that hold it.
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
            if is_main:
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
