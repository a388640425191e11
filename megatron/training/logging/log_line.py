"""The line that a training run prints, in the form that log parsers of this field read."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field


@dataclass
class IntervalTotals:
    """What has been summed since the last log line."""

    losses: dict[str, float] = field(default_factory=dict)
    advanced: int = 0
    skipped: int = 0
    nan: int = 0

    def add(self, losses: dict[str, float], was_skipped: bool) -> None:
        """Count one iteration; the losses of skipped ones do not enter the averages."""
        if was_skipped:
            self.skipped += 1
            finite = all(abs(value) < float("inf") for value in losses.values())  # false for nan, too
            self.nan += not finite
            return
        self.advanced += 1
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    @property
    def iterations(self) -> int:
        """Iterations since the last log line."""
        return self.advanced + self.skipped

    def averages(self) -> dict[str, float]:
        """Mean losses of the iterations that were not skipped."""
        return {name: total / max(1, self.advanced) for name, total in self.losses.items()}


@dataclass(kw_only=True)
class LogLine:
    """The fields of the line; None leaves a field out."""

    iteration: int
    train_iters: int
    consumed_samples: int
    skipped_samples: int = 0
    milliseconds: float
    tflops: float | None = None
    joules: float | None = None
    """Of one iteration on one device."""
    learning_rate: float
    decoupled_learning_rate: float | None = None
    global_batch_size: int
    losses: dict[str, float]
    loss_scale: float
    grad_norm: float | None = None
    num_zeros: int | None = None
    params_norm: float | None = None
    skipped_iterations: int
    nan_iterations: int

    def __str__(self) -> str:
        parts = [
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
        ]
        if self.skipped_samples:
            parts.append(f"skipped samples: {self.skipped_samples:12d}")
        parts.append(f"elapsed time per iteration (ms): {self.milliseconds:.1f}")
        if self.tflops is not None:
            parts.append(f"throughput per GPU (TFLOP/s/GPU): {self.tflops:.1f}")
        if self.joules is not None:
            parts.append(f"energy per GPU (J/iter/GPU): {self.joules:.1f}")
            parts.append(f"power per GPU (W/GPU): {self.joules / (self.milliseconds / 1000):.1f}")
        parts.append(f"learning rate: {self.learning_rate:.6E}")
        if self.decoupled_learning_rate is not None:
            parts.append(f"decoupled learning rate: {self.decoupled_learning_rate:.6E}")
        parts.append(f"global batch size: {self.global_batch_size:5d}")
        parts += [f"{name}: {value:.6E}" for name, value in self.losses.items() if value > 0]
        parts.append(f"loss scale: {self.loss_scale:.1f}")
        if self.grad_norm is not None:
            parts.append(f"grad norm: {self.grad_norm:.3f}")
        if self.num_zeros is not None:
            parts.append(f"num zeros: {self.num_zeros}")
        if self.params_norm is not None:
            parts.append(f"params norm: {self.params_norm:.3f}")
        parts.append(f"number of skipped iterations: {self.skipped_iterations:3d}")
        parts.append(f"number of nan iterations: {self.nan_iterations:3d}")
        return " | ".join(parts) + " |"
