"""From parallel sizes to process groups, without making them anybody's default.

`parallel_state.initialize_model_parallel` installs what is created here as the process-wide default. A program that
hands groups to its models, wrappers and optimizers itself needs no more than this:

    groups = create_process_groups(tensor_model_parallel_size=2, pipeline_model_parallel_size=2).groups
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.communicators import DEFAULT, Communicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rank_grid import (
    RankGroups,
    default_embedding_ranks,
    default_position_embedding_ranks,
    dense_layout,
    expert_layout,
    group_plan,
    hierarchical_plan,
    hierarchical_ranks,
)

EmbeddingRanks = Callable[[list[int], "int | None"], list[int]]
"""(ranks of a pipeline, None) -> those that hold an embedding."""


@dataclass(frozen=True)
class CreatedGroups:
    """This rank's groups."""

    groups: ProcessGroupCollection
    ranks: dict[str, list[int]]
    """Global ranks of this rank's group, by field name of `ProcessGroupCollection`."""
    communicators: list[ProcessGroup]
    """The distinct ones, with this rank in them."""

    def destroy(self) -> None:
        """Shut the communicators down; the world group stays."""
        if dist.is_initialized():
            for group in self.communicators:
                if group is not dist.group.WORLD:
                    dist.destroy_process_group(group)


def create_process_groups(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: list[int] | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    num_distributed_optimizer_instances: int = 1,
    pipeline_model_parallel_split_rank: int | None = None,
    order: str = "tp-cp-ep-dp-pp",
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
    get_embedding_ranks: EmbeddingRanks = default_embedding_ranks,
    get_position_embedding_ranks: EmbeddingRanks = default_position_embedding_ranks,
    communicators: Mapping[str, Communicator] | None = None,
) -> CreatedGroups:
    """Every process group of a layout over the whole world.

    Collective: all ranks call it with the same arguments. Ranks whose groups consist of the same members share one
    communicator, unless these are made differently.

    Args:
        communicators: of groups that are made in another way than the world, by field of `ProcessGroupCollection`,
            see `plan_communicators`.

    Args:
        pipeline_model_parallel_split_rank: pipeline ranks before this one hold an encoder, the others its decoder.

    Raises:
        RuntimeError: torch.distributed is not initialised, or the sizes do not fit the world.
    """
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group(...) before process groups are created")
    tp, pp, cp = tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size
    etp = expert_tensor_parallel_size or tp
    world_size = dist.get_world_size()
    layout = dense_layout(world_size, tp, pp, cp, order)
    expert_grid = expert_layout(world_size, etp, expert_model_parallel_size, pp, order)
    if layout.get_ranks("pp") != expert_grid.get_ranks("pp"):
        raise RuntimeError(
            f"rank order {order!r} gives experts (tensor {etp} × expert {expert_model_parallel_size}) pipelines that "
            "differ from the dense layers'; put pp last in the order"
        )
    plan = group_plan(
        layout,
        expert_grid,
        num_distributed_optimizer_instances,
        get_embedding_ranks,
        get_position_embedding_ranks,
        pipeline_model_parallel_split_rank,
    )
    if hierarchical_context_parallel_sizes:
        for level, groups in enumerate(hierarchical_plan(layout, hierarchical_context_parallel_sizes)):
            plan[f"hcp{level}"] = groups
    return _create(plan, timeout, communicators or {})


def _create(
    plan: dict[str, RankGroups], timeout: datetime.timedelta, special: Mapping[str, Communicator]
) -> CreatedGroups:
    """The planned groups, one communicator for each distinct set of ranks and way of making it."""
    rank = dist.get_rank()
    made: dict[tuple[tuple[int, ...], Communicator], ProcessGroup] = {}
    mine: dict[str, ProcessGroup] = {}
    my_ranks: dict[str, list[int]] = {}
    communicators: list[ProcessGroup] = []
    for name, groups in plan.items():
        communicator = special.get("hcp" if name.startswith("hcp") else name, DEFAULT)
        for ranks in groups:
            key = tuple(ranks), communicator
            if key not in made:  # every rank creates every group, in the same order
                made[key] = dist.new_group(ranks, timeout, group_desc=name, **communicator.arguments(timeout))
                if rank in ranks:
                    communicators.append(made[key])
            if rank in ranks:
                mine[name] = made[key]
                my_ranks[name] = list(ranks)
    levels = tuple(mine.pop(name) for name in [n for n in mine if n.startswith("hcp")])
    return CreatedGroups(ProcessGroupCollection(**mine, hcp=levels or None), my_ranks, communicators)


def create_hierarchical_groups(
    rank: int,
    ranks: list[int],
    hierarchical_group_sizes: list[int],
    create_gloo_process_groups: bool = False,
    pg_options: Any = None,
    timeout: datetime.timedelta | None = None,
    group_desc: str | None = None,
) -> tuple[list[ProcessGroup], list[ProcessGroup]]:
    """This rank's group of each level of a hierarchy over `ranks`, innermost first; the same on gloo, if asked for.

    Collective over the whole world, which makes all groups; `rank` is this rank.
    """
    levels = hierarchical_ranks(ranks, hierarchical_group_sizes)
    made: list[list[ProcessGroup]] = [[], []]
    backends = [device.communication_backend(), *(["gloo"] if create_gloo_process_groups else [])]
    for groups in levels:
        for members in groups:
            for found, backend in zip(made, backends):
                options = pg_options if backend != "gloo" else None
                group = dist.new_group(members, timeout, backend, options, group_desc=group_desc)
                if rank in members:
                    found.append(group)
    return made[0], made[1]


def create_group(
    ranks: list[int] | None = None,
    timeout: datetime.timedelta | None = None,
    backend: str | None = None,
    group_desc: str | None = None,
) -> ProcessGroup:
    """`torch.distributed.new_group` on the backend of this device."""
    return dist.new_group(
        ranks, timeout=timeout, backend=backend or device.communication_backend(), group_desc=group_desc
    )
