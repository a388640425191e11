"""Everything a training run consists of, handed from action to action."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.evaluation import HeldOut
from megatron.training.logging.energy import EnergyMeter
from megatron.training.logging.log_line import IntervalTotals
from megatron.training.logging.progress import ProgressLine
from megatron.training.train_state import TrainState
from megatron.training.train_step import StepResult


class StopTraining(Exception):
    """Raised by an action to end the loop; the message says why."""


@dataclass
class Run:
    """Model, data, counters and habits of one run."""

    args: Any
    state: TrainState
    model: list[nn.Module]
    optimizer: Any
    scheduler: Any
    config: Any
    forward_step_func: Callable[..., Any]
    train_data: Any
    validation_sets: list[HeldOut]
    test_sets: list[HeldOut]
    """One, or none."""
    started: float
    """Unix time at which the program started."""
    first_iteration: int = 0
    saved_iteration: int | None = None
    """The iteration that the newest checkpoint of this run holds."""
    totals: IntervalTotals = field(default_factory=IntervalTotals)
    progress: ProgressLine = field(default_factory=lambda: ProgressLine(False, 0))
    flops_at_start: float = 0.0
    has_reported_memory: bool = False
    energy: EnergyMeter | None = None
    """Counts with `--log-energy`."""
    checkpoints: CheckpointContext = field(default_factory=CheckpointContext)

    @property
    def batch_size(self) -> int:
        """Samples of the current global batch as it is run."""
        return get_num_microbatches() * self.args.micro_batch_size * self.args.data_parallel_size

    def minutes(self) -> float:
        """Minutes since the program started."""
        return (time.time() - self.started) / 60


Action = Callable[[Run, StepResult], None]
