"""What this process knows of its layout: its groups, which `parallel_state` has made the default, and pretended ranks.

`parallel_state` and `pipeline_stages` are its faces; nothing else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.group_creation import CreatedGroups
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.stage_placement import PlacementShape


@dataclass
class LayoutState:
    """What `initialize_model_parallel` leaves behind besides the groups."""

    created: CreatedGroups | None = None
    virtual_pipeline_size: int | None = None
    virtual_pipeline_rank: int | None = None
    placement_shape: PlacementShape = "loop"
    split_rank: int | None = None
    """Pipeline ranks before this one hold an encoder, the others its decoder; None where stages are not parted."""
    overrides: dict[str, int] = field(default_factory=dict)
    """Ranks and sizes pretended by the `set_*` functions, for tools that run without processes."""

    def reset(self) -> None:
        """As before `initialize_model_parallel`."""
        fresh = LayoutState()
        for entry in fields(self):
            setattr(self, entry.name, getattr(fresh, entry.name))


layout = LayoutState()
"""The one of this process."""


def group_of(name: str, check_initialized: bool = True) -> ProcessGroup:
    """Group `name` of this rank, a field of `ProcessGroupCollection`; None only where not checked."""
    if not check_initialized and not has_default_process_groups():
        return None  # type: ignore[return-value]
    group = getattr(default_process_groups(), name)
    if group is None and check_initialized:
        raise RuntimeError(f"this rank is in no {name!r} group of the present layout")
    return group


def group_ranks(name: str) -> list[int]:
    """Global ranks of this rank's group `name`, a field of `ProcessGroupCollection`."""
    default_process_groups()
    assert layout.created is not None
    return layout.created.ranks[name]


def created_ranks(name: str) -> list[int]:
    """As `group_ranks`; empty where this rank is in no such group."""
    return [] if layout.created is None else layout.created.ranks.get(name, [])


def size_of(name: str) -> int:
    """Number of ranks in group `name`, or what is pretended; 1 without groups."""
    if f"{name}_size" in layout.overrides:
        return layout.overrides[f"{name}_size"]
    return group_of(name).size() if dist.is_initialized() and has_default_process_groups() else 1


def rank_in(name: str) -> int:
    """Place of this rank in group `name`, or what is pretended; 0 without groups."""
    if f"{name}_rank" in layout.overrides:
        return layout.overrides[f"{name}_rank"]
    return group_of(name).rank() if dist.is_initialized() and has_default_process_groups() else 0
