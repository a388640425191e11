"""What a program keeps for its whole run: arguments, tokenizer, timers, trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.timers import Timers
from megatron.training.signal_handler import SignalHandler
from megatron.training.train_state import TrainState

if TYPE_CHECKING:
    from megatron.training.logging.trackers import Trackers


@dataclass
class _Globals:
    args: Any = None
    tokenizer: Any = None
    timers: Timers | None = None
    trackers: Trackers | None = None
    signal_handler: SignalHandler | None = None
    train_state: TrainState = field(default_factory=TrainState)


_globals = _Globals()


def _get(name: str) -> Any:
    value = getattr(_globals, name)
    if value is None:
        raise RuntimeError(f"{name} is not set; call initialize_megatron(...) first")
    return value


def get_args() -> Any:
    """The resolved configuration, read-only once the program is initialised."""
    return _get("args")


def get_tokenizer() -> Any:
    """The tokenizer."""
    return _get("tokenizer")


def get_timers() -> Timers:
    """The timers."""
    return _get("timers")


def get_trackers() -> Trackers | None:
    """TensorBoard, wandb and the metrics file of the rank that logs; None elsewhere."""
    return _globals.trackers


def get_tensorboard_writer() -> Any:
    """The TensorBoard writer of the rank that logs, None elsewhere or without --tensorboard-dir."""
    return _globals.trackers.tensorboard if _globals.trackers else None


def get_wandb_writer() -> Any:
    """The wandb module of the rank that logs, None elsewhere or without --wandb-project."""
    return _globals.trackers.wandb if _globals.trackers else None


def get_signal_handler() -> SignalHandler:
    """Notes SIGTERM with --exit-signal-handler."""
    return _get("signal_handler")


def get_train_state() -> TrainState:
    """Counters of the run: all zero until a checkpoint was loaded or training has begun."""
    return _globals.train_state


def set_train_state(state: TrainState) -> None:
    """Make `state` the counters of the run; training keeps them up to date in place."""
    _globals.train_state = state


def set_args(args: Any) -> None:
    """Make `args` the configuration."""
    _globals.args = args


def set_global_variables(args: Any, build_tokenizer: bool = True) -> None:
    """Set everything that needs no process group: microbatches, tokenizer, timers, signal handler.

    Sets `args.padded_vocab_size` from the tokenizer unless a checkpoint has set it.
    """
    set_args(args)
    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    _globals.timers = Timers(args.timing_log_level, args.timing_log_option)
    if build_tokenizer:
        rebuild_tokenizer(args)
    if args.exit_signal_handler:
        _globals.signal_handler = SignalHandler()


def set_trackers(trackers: Trackers | None) -> None:
    """Set the trackers of the rank that logs."""
    _globals.trackers = trackers


def rebuild_tokenizer(args: Any) -> Any:
    """Build the tokenizer of `args` anew."""
    from megatron.training.tokenizer import build_tokenizer

    _globals.tokenizer = build_tokenizer(args)
    return _globals.tokenizer


def destroy_global_vars() -> None:
    """Forget everything, for a second run in the same process."""
    global _globals
    _globals = _Globals()
    destroy_num_microbatches_calculator()


unset_global_variables = destroy_global_vars
