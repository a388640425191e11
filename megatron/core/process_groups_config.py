"""The process groups of one rank, as a value that can be handed to a model or an optimizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(kw_only=True)
class ProcessGroupCollection:
    """Groups this rank belongs to, one field for each set of parallel axes.

    A field that a module does not need may stay `None`. `from_parallel_state` gives the process-wide default
    that `parallel_state.initialize_model_parallel` made.
    """

    tp: ProcessGroup | None = None
    """Tensor parallel."""
    pp: ProcessGroup | None = None
    """Pipeline parallel."""
    mp: ProcessGroup | None = None
    """Model parallel: tensor × pipeline."""
    embd: ProcessGroup | None = None
    """First and last pipeline stage, which both hold the tied embedding."""
    pos_embd: ProcessGroup | None = None
    """Stages that hold position embeddings."""
    cp: ProcessGroup | None = None
    """Context parallel."""
    tp_cp: ProcessGroup | None = None
    """Tensor × context."""
    tp_dp: ProcessGroup | None = None
    """Tensor × data."""
    tp_dp_cp: ProcessGroup | None = None
    """Tensor × data × context."""
    hcp: tuple[ProcessGroup, ...] | None = None
    """Levels of hierarchical context parallelism, innermost first."""
    ep: ProcessGroup | None = None
    """Expert parallel."""
    expt_tp: ProcessGroup | None = None
    """Tensor parallel inside experts."""
    tp_ep: ProcessGroup | None = None
    """Expert tensor × expert."""
    tp_ep_pp: ProcessGroup | None = None
    """Expert tensor × expert × pipeline."""
    dp: ProcessGroup | None = None
    """Data parallel."""
    dp_cp: ProcessGroup | None = None
    """Data × context: ranks over which gradients of dense parameters are averaged."""
    intra_dp_cp: ProcessGroup | None = None
    """The part of `dp_cp` inside one distributed-optimizer instance."""
    expt_dp: ProcessGroup | None = None
    """Data parallel replicas of the experts."""
    intra_expt_dp: ProcessGroup | None = None
    """The part of `expt_dp` inside one distributed-optimizer instance."""
    inter_dist_opt: ProcessGroup | None = None
    """Same shard in all distributed-optimizer instances."""
    intra_dist_opt: ProcessGroup | None = None
    """All ranks of one distributed-optimizer instance."""

    @classmethod
    def from_parallel_state(cls, required_pgs: list[str] | None = None) -> ProcessGroupCollection:
        """The groups that `parallel_state.initialize_model_parallel` made (all, or those named)."""
        groups = default_process_groups()
        if required_pgs is None:
            return groups
        return cls(**{name: getattr(groups, name) for name in required_pgs})

    use_mpu_process_groups = from_parallel_state

    def replace(self, **groups: ProcessGroup) -> ProcessGroupCollection:
        """A copy with some groups exchanged."""
        return dataclasses.replace(self, **groups)  # type: ignore[arg-type]


ModelCommProcessGroups = ProcessGroupCollection
GradCommProcessGroups = ProcessGroupCollection

_default: ProcessGroupCollection | None = None


def set_default_process_groups(groups: ProcessGroupCollection | None) -> None:
    """Make `groups` what modules use that are not handed any; `None` forgets them."""
    global _default
    _default = groups


def default_process_groups() -> ProcessGroupCollection:
    """The groups made by `parallel_state.initialize_model_parallel`.

    Raises:
        RuntimeError: there are none yet.
    """
    if _default is None:
        raise RuntimeError(
            "no process groups: call parallel_state.initialize_model_parallel(...) first, or hand groups in"
        )
    return _default


def has_default_process_groups() -> bool:
    """Whether `default_process_groups` would return."""
    return _default is not None
