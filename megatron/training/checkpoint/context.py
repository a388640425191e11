"""What saving keeps from one checkpoint to the next: saves under way, the memory for them, what was found out once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.background import BackgroundSaver
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.training.checkpoint.paths import discard_checkpoint

WRITERS = {"mcore": "process", "thread": "thread"}
"""`--async-strategy` -> how the library calls it."""


class CheckpointContext:
    """Shared by all saves of a run. At most one save is under way at a time."""

    def __init__(self) -> None:
        self.queue = AsyncCallsQueue()
        self.under_way: Path | None = None
        self._saver: BackgroundSaver | None = None
        self._strategies: dict[str, SaveShardedStrategy] = {}
        self._checked: set[str] = set()
        self.kept: dict[str, Any] = {}
        """What else is made once, by name."""

    # --- saves under way ---

    def saver(self, args: argparse.Namespace) -> BackgroundSaver:
        """Copies the state and writes it in the background."""
        if self._saver is None:
            self._saver = BackgroundSaver(WRITERS[args.async_strategy], bool(args.use_persistent_ckpt_worker))
        return self._saver

    def prepare(self, args: argparse.Namespace, model: list[nn.Module], optimizer: Any) -> None:
        """Make the memory for copies of the state before the first save needs it, with `--async-save`."""
        if args.async_save and args.save:
            self.saver(args).prepare(bytes_of_share(args, model, optimizer))

    def schedule(self, request: AsyncRequest, directory: Path | None) -> None:
        """Start writing what was copied; `directory` is removed if that fails."""
        self.under_way = directory
        self.queue.schedule_async_request(request)

    def finish(self, blocking: bool = False) -> None:
        """Publish the save under way if all ranks have written it, or wait until they have. All ranks call this.

        Raises:
            CheckpointingException: writing failed on some rank; nothing was published.
        """
        try:
            done = self.queue.maybe_finalize_async_calls(blocking)
        except CheckpointingException:
            directory, self.under_way = self.under_way, None
            if directory is not None:
                on_first_rank(f"cannot clean {directory}", lambda: discard_checkpoint(directory))
            raise
        if done:
            self.under_way = None

    def close(self) -> None:
        """Finish everything and free the memory. All ranks call this."""
        self.finish(blocking=True)
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    # --- what stays the same from save to save ---

    def save_strategy(self, args: argparse.Namespace) -> SaveShardedStrategy:
        """How sharded state is written; with --ckpt-assume-constant-structure the division of labour is kept."""
        constant = bool(args.ckpt_assume_constant_structure)
        if args.ckpt_format in self._strategies:
            return self._strategies[args.ckpt_format]
        strategy = get_default_save_sharded_strategy(args.ckpt_format)
        if args.ckpt_fully_parallel_save:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            strategy = FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=constant)
        if constant:
            self._strategies[args.ckpt_format] = strategy
        return strategy

    def needs_check(self, args: argparse.Namespace, what: str) -> bool:
        """Whether the ranks still have to compare what they save; with a constant structure once is enough."""
        if args.ckpt_assume_constant_structure and what in self._checked:
            return False
        self._checked.add(what)
        return True


def held(param: Any) -> int:
    """Elements of a parameter that lie on this rank."""
    return (param.to_local() if hasattr(param, "to_local") else param).numel()


def bytes_of_share(args: argparse.Namespace, model: list[nn.Module], optimizer: Any) -> int:
    """About how much this rank writes: its share of the weights, main weights and two moments."""
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    share = replicas if args.ckpt_fully_parallel_save else 1
    weights = sum(held(param) * param.element_size() for chunk in model for param in chunk.parameters())
    main = sum(held(param) for group in optimizer.param_groups for param in group["params"]) * 4
    copies = 3 if args.use_distributed_optimizer or args.params_dtype != torch.float32 else 2
    state = copies * main if args.use_distributed_optimizer else copies * main // share
    return int((weights // share + state) * 1.05) + (1 << 20)


_default: CheckpointContext | None = None


def default_context() -> CheckpointContext:
    """The context of callers that hand in none."""
    global _default
    if _default is None:
        _default = CheckpointContext()
    return _default


def context_in(checkpointing_context: dict[str, Any] | CheckpointContext | None) -> CheckpointContext:
    """The context that a caller keeps, also in a dictionary of its own."""
    if checkpointing_context is None:
        return default_context()
    if isinstance(checkpointing_context, CheckpointContext):
        return checkpointing_context
    return checkpointing_context.setdefault("context", CheckpointContext())


Saved = Callable[[Path], None]
"""Told the directory of a checkpoint once it is published, on all ranks."""
