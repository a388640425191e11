"""Whether the checkpoint that a task is to use is there."""

from __future__ import annotations

from typing import Any

from megatron.training.settings import Source, refuse_unless


def require_checkpoint(args: Any) -> None:
    """Take the weights of `--load` and nothing else, and stop if there are none."""
    refuse_unless(args.load, f"--task {args.task} needs --load, the checkpoint to evaluate")
    for name in ("exit_on_missing_checkpoint", "no_load_optim", "no_load_rng"):
        args.put(name, True, Source("program"))
