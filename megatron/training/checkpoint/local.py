"""Checkpoints for a short while on the nodes' own disks, or in their memory: fast, and for the layout that wrote them.

Each rank writes what is its share into a directory of its own, `iter_0000010/rank_00003`, which is a small `torch_dist`
checkpoint with a manifest. With `--replication` ranks on other nodes keep copies of it. A run that starts again puts
together what is left on all nodes: every rank reads what it sees, and gets the rest from ranks that see it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import gather_from_all, rank_and_size, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.durable import FileRecord, sync_directory
from megatron.core.dist_checkpointing.manifest import damaged_files, read_manifest, write_manifest
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy, split_for_saving
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.catalog import Written, catalog_of
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.file_plan import FilePlan, plan_files, write_plans
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
    as_replica,
    shard_id,
)
from megatron.core.dist_checkpointing.strategies.sharded_files import local_entries
from megatron.core.dist_checkpointing.strategies.torch_files import (
    DATA_SUFFIX,
    make_data_file,
    metadata_file,
    pickled,
)
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.paths import iteration_name, unfinished_name
from megatron.training.checkpoint.replication import ReplicationGroup, rank_name

KINDS = ("local", "in_memory")
_MEMORY = Path("/dev/shm")


def local_root(args: argparse.Namespace) -> Path:
    """Where this node keeps the checkpoints of this run."""
    if args.non_persistent_ckpt_type == "local":
        return Path(args.non_persistent_local_ckpt_dir)
    run = hashlib.sha256(os.path.abspath(args.save or args.load).encode()).hexdigest()[:16]
    return _MEMORY / f"megatron-checkpoints-{os.getuid()}" / run


# ---- saving ----


def save_local(
    args: argparse.Namespace, contents: dict[str, Any], iteration: int, context: CheckpointContext
) -> AsyncRequest | None:
    """Write this rank's share, and copies of it to its peers; with `--async-save` only copy it. All ranks call this.

    If any rank fails, all raise, and the previous local checkpoint stays.
    """
    root = local_root(args)
    place = root / iteration_name(iteration)
    plans: list[FilePlan] = []
    with together(f"cannot save to {root}"):
        place.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_name(place, iteration)
        unfinished.mkdir()
    sharded, common = split_for_saving(contents)
    take_share(sharded, args.non_persistent_local_ckpt_algo)
    with together(f"cannot save to {root}"):
        plans = plan_share(sharded, common)
    group = ReplicationGroup.of(args, context)

    def publish(records: dict[str, FileRecord]) -> None:
        own = place / rank_name(rank_and_size()[0])
        with together(f"cannot save to {root}"):
            write_manifest(unfinished, records)
            sync_directory(unfinished)
            shutil.rmtree(own, ignore_errors=True)
            os.rename(unfinished, own)
            sync_directory(place)
        if group is not None:
            group.exchange(own)
        _remove_others(root, iteration)

    if args.async_save:
        staged = context.saver(args).stage(plans, unfinished)
        return AsyncRequest(staged.write, (), [lambda: publish(staged.records)])
    records: dict[str, FileRecord] = {}
    try:
        with together(f"cannot save to {root}"):
            records = write_plans(plans, unfinished)
        publish(records)
    except CheckpointingException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return None


def take_share(sharded: ShardedStateDict, algorithm: str) -> None:
    """Mark, in place, what this rank writes: everything that it has (`atomic`), or of what data parallel ranks have in
    common an equal part (`fully_parallel`). Objects are small and are written by every rank."""
    seen: set[Any] = set()
    for value in nested_values(sharded):
        name = shard_id(value) if isinstance(value, ShardedTensor) else value.unique_key
        value.replica_id = as_replica(value.replica_id, is_main=name not in seen)
        seen.add(name)
    if algorithm == "fully_parallel":
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = get_default_save_sharded_strategy("torch_dist")
        FullyParallelSaveStrategyWrapper(strategy, group).apply_saving_parallelization(sharded)


def plan_share(sharded: ShardedStateDict, common: dict[str, Any]) -> list[FilePlan]:
    """The files of this rank."""
    rank, _ = rank_and_size()
    plans = plan_files(list(local_entries(sharded)), rank, 2, make_data_file, DATA_SUFFIX)
    written: Iterable[Written] = (w for plan in plans for w in plan.written)
    return [*plans, metadata_file(catalog_of(written)), FilePlan(COMMON_STATE_FNAME, [pickled(common)])]


def _remove_others(root: Path, newest: int) -> None:
    """Remove, once all ranks have published, what this rank sees of older checkpoints."""
    if rank_and_size()[1] > 1:
        dist.barrier()
    for place in root.glob("iter_*"):
        if place.name != iteration_name(newest):
            shutil.rmtree(place, ignore_errors=True)


# ---- loading ----


def visible_shares(root: Path, checksums: bool) -> dict[int, dict[int, Path]]:
    """Iteration -> rank -> directory with that rank's share, of all whole ones that this rank sees."""
    found: dict[int, dict[int, Path]] = {}
    for place in root.glob("iter_*/rank_*"):
        names = re.fullmatch(r"iter_(\d+)/rank_(\d+)", f"{place.parent.name}/{place.name}")
        if names is None:
            continue
        try:
            records = read_manifest(place)
        except CheckpointingException:
            continue
        if records is not None and not damaged_files(place, records, None, checksums):
            found.setdefault(int(names[1]), {})[int(names[2])] = place
    return found


def local_iterations(args: argparse.Namespace) -> tuple[list[int], dict[int, dict[int, Path]]]:
    """(iterations of which some rank sees something, the newest first; what this rank sees). All ranks call this."""
    seen: dict[int, dict[int, Path]] = {}
    with together(f"cannot look into {local_root(args)}"):
        seen = visible_shares(local_root(args), args.ckpt_verify == "checksums")
    return sorted({i for ranks in gather_from_all(list(seen)) for i in ranks}, reverse=True), seen


def common_of_own_rank(seen: dict[int, Path]) -> dict[str, Any]:
    """The common state of this rank, from whoever sees it; of another rank if nobody does. All ranks call this.

    Common states of ranks differ in nothing but the order of parameter groups, which are matched when they are loaded.
    """
    rank, size = rank_and_size()
    have = gather_from_all(sorted(seen))
    own: dict[str, Any] = {}
    with together("cannot read the common state"):
        if seen:
            own = read_common_file(seen[rank if rank in seen else min(seen)])
    for receiver in range(size):
        exact = [r for r in range(size) if receiver in have[r]]
        if receiver in have[receiver] or have[receiver] and not exact:
            continue
        reader = (exact or [r for r in range(size) if have[r]])[0]
        if rank == reader:
            dist.send_object_list([read_common_file(seen[receiver if exact else min(seen)])], receiver)
        elif rank == receiver:
            received: list[Any] = [None]
            dist.recv_object_list(received, reader)
            own = received[0]
    return own


def read_common_file(share: Path) -> dict[str, Any]:
    """The common state in a rank's share."""
    content = safe_torch_load(share / COMMON_STATE_FNAME)
    if not isinstance(content, dict):
        raise CheckpointingException(f"{share / COMMON_STATE_FNAME} holds no state dict")
    return content
