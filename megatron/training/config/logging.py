"""What is logged, and where to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class LoggingConfig:
    """Log line, timers, TensorBoard, wandb and the metrics file."""

    log_params_norm: bool = False
    """Log the norm of the weights."""
    log_throughput: bool = False
    """Log TFLOP/s per device."""
    log_progress: bool = False
    """Add lines on the progress to a file in the --save folder."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Detail of timers: 0 the whole step, 1 its phases, 2 every part."""
    log_energy: bool = False
    """Log the energy that each CUDA device uses."""
    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Which ranks' times are shown."""
    tensorboard_log_interval: int = 1
    """Steps between points in TensorBoard."""
    tensorboard_queue_size: int = 1000
    """Points that may wait to be written."""
    log_timers_to_tensorboard: bool = False
    """Timers to TensorBoard."""
    log_loss_scale_to_tensorboard: bool = True
    """The loss scale to TensorBoard."""
    log_validation_ppl_to_tensorboard: bool = False
    """Validation perplexity to TensorBoard."""
    log_memory_to_tensorboard: bool = False
    """Device memory to TensorBoard."""
    log_world_size_to_tensorboard: bool = False
    """The number of ranks to TensorBoard."""
    wandb_project: str = ""
    """Project on wandb; empty is off."""
    wandb_exp_name: str = ""
    """Name of the run on wandb."""
    wandb_save_dir: str = ""
    """Folder for wandb's own files."""
    logging_level: int | None = None
    """Level of Python's logging; unset takes MEGATRON_LOGGING_LEVEL, else INFO (20)."""
    metrics_jsonl: str | None = None
    """File that gets one JSON line per logged step; unset is metrics.jsonl in the --save folder."""
    timeline: str | None = None
    """Folder for a picture of what every rank did in a step, as a web page and as a trace for Perfetto."""
    timeline_step: list[int] = field(default_factory=lambda: [5])
    """Iterations that --timeline records."""
    progress_bar: bool = True
    """Show a live progress line on a terminal."""
