"""Copies of a rank's local checkpoint on other nodes."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.collective import rank_and_size, together
from megatron.core.dist_checkpointing.durable import sync_directory, write_durably
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.paths import unfinished_name


def replication_groups(world_size: int, jump: int, factor: int) -> list[list[int]]:
    """Ranks that keep copies of each other's checkpoints: `factor` of them, `jump` apart.

    >>> replication_groups(8, jump=2, factor=2)
    [[0, 2], [1, 3], [4, 6], [5, 7]]

    Raises:
        ValueError: the ranks do not divide into such groups.
    """
    block = jump * factor
    if jump < 1 or factor < 2 or world_size % block:
        raise ValueError(
            f"replication_jump ({jump}) times replication_factor ({factor}) must divide the {world_size} ranks, with a "
            "factor of at least 2"
        )
    return [
        [start + first + k * jump for k in range(factor)]
        for start in range(0, world_size, block)
        for first in range(jump)
    ]


def rank_name(rank: int) -> str:
    """Directory of a rank's share of a local checkpoint."""
    return f"rank_{rank:05d}"


@dataclass(frozen=True)
class ReplicationGroup:
    """The ranks that keep copies for this one, and the group over which they talk."""

    ranks: list[int]
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, args: argparse.Namespace, context: CheckpointContext) -> ReplicationGroup | None:
        """This rank's group, made at the first call; None without `--replication`. All ranks call this."""
        if not args.replication:
            return None
        made = context.kept.get("replication")
        if made is None:
            rank, size = rank_and_size()
            for ranks in replication_groups(size, args.replication_jump, args.replication_factor):
                group = dist.new_group(ranks, backend="gloo")
                if rank in ranks:
                    made = cls(ranks, group)
            context.kept["replication"] = made
        assert isinstance(made, cls)
        return made

    def exchange(self, own: Path) -> None:
        """Send the files in `own` to the other ranks of the group and keep theirs beside it. All ranks call this."""
        with together("cannot copy checkpoints to other nodes"):
            names = sorted(path.name for path in own.iterdir())
            listed: list[list[tuple[str, int]]] = [[] for _ in self.ranks]
            sizes = [(name, (own / name).stat().st_size) for name in names]
            dist.all_gather_object(listed, sizes, group=self.group)
            for rank, files in zip(self.ranks, listed):
                self._pass(rank, files, own)

    def _pass(self, sender: int, files: list[tuple[str, int]], own: Path) -> None:
        """One rank sends, the others of the group write; if one of them fails, all of them raise."""
        receives = rank_and_size()[0] != sender
        arriving = unfinished_name(own.parent, 0)
        with together(f"cannot write {arriving}", self.group):
            if receives:
                arriving.mkdir()
        for name, size in files:
            data = torch.empty(size, dtype=torch.uint8)
            if not receives:
                data.numpy()[:] = memoryview((own / name).read_bytes())
            dist.broadcast(data, sender, group=self.group)
            with together(f"cannot write {arriving}", self.group):
                if receives:
                    write_durably(arriving / name, [data.numpy()])
        target = own.with_name(rank_name(sender))
        with together(f"cannot write {target}", self.group):
            if receives and not target.exists():  # nodes that share a disk have it already
                sync_directory(arriving)
                os.rename(arriving, target)
            elif receives:
                shutil.rmtree(arriving)
