"""Training for a number of epochs with the training loop of `pretrain`, and what is done after each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.enums import ModelType
from megatron.training import print_rank_0
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.paths import checkpoint_exists
from megatron.training.checkpoint.save import save_run
from megatron.training.periodic import interval_paused, save
from megatron.training.run import Run
from megatron.training.settings import Source, refuse_unless
from megatron.training.train_state import TrainState
from megatron.training.train_step import StepResult
from megatron.training.training import close, set_up, train_to_the_end
from tasks.finetuning.accuracy import Count
from tasks.finetuning.examples import batches_per_epoch

BEST = "best"
Measure = Callable[[Run, int], Count]
"""(run, number of the epoch that is over) -> right answers on all validation sets. All ranks call it."""


def set_length(args: Any, num_examples: int) -> int:
    """Set the length of the run to `--epochs`; the steps of one of them."""
    for name in ("train_iters", "train_samples", "rampup_batch_size"):
        flag = f"--{name.replace('_', '-')}"
        refuse_unless(getattr(args, name) is None, f"{flag} has no meaning here: --epochs is the length of the run")
    refuse_unless(args.micro_batch_size, "--micro-batch-size is required and must be positive")
    ranks = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    batch = args.global_batch_size or args.micro_batch_size * max(ranks, 1)
    per_epoch = batches_per_epoch(num_examples, batch, args.keep_last)
    refuse_unless(
        per_epoch,
        f"--train-data has {num_examples} examples, too few for a batch of {batch}; lower --micro-batch-size or "
        "--global-batch-size, or pass --keep-last",
    )
    args.put("train_iters", per_epoch * args.epochs, Source("flag", "--epochs"))
    return per_epoch


def train_for_epochs(
    provider: Any,
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    load: Callable[..., TrainState],
    per_epoch: int,
    measure: Measure,
) -> None:
    """Train from initialised settings; after each epoch measure, save, and keep the best model apart.

    Args:
        provider, model_provider, forward_step: as `pretrain` takes them; each rank builds the data.
        load: see `set_up`.
        per_epoch: steps of an epoch.
    """

    def provide(num_samples: list[int]) -> Any:
        return provider(num_samples)

    provide.is_distributed = True  # type: ignore[attr-defined]
    run = set_up(provide, model_provider, ModelType.encoder_or_decoder, forward_step, load)
    train_to_the_end(run, [EndOfEpoch(per_epoch, measure, Best.so_far(run.args))])
    close(run)


@dataclass
class Best:
    """The best model of a run, kept in the folder `best` of `--save`."""

    folder: Path | None
    percent: float = -1.0

    @classmethod
    def so_far(cls, args: Any) -> Best:
        """Nothing yet, or what an interrupted run has left. All ranks call this."""
        folder = Path(args.save) / BEST if args.save else None
        if folder is None or not args.load:
            return cls(folder)
        return cls(folder, on_first_rank(f"cannot read {folder}", lambda: _percent_in(folder)))

    def update(self, run: Run, overall: Count, epoch: int) -> None:
        """Save the model if it is better than all before it. All ranks call this."""
        if self.folder is None or overall.percent <= self.percent:
            return
        self.percent = overall.percent
        args = run.args.variant(
            save=str(self.folder), no_save_optim=True, no_save_rng=True, async_save=False, save_keep_last=1
        )
        args.save_retain_interval = None
        save_run(args, run.state, run.model, None, None, CheckpointContext())
        note = {"epoch": epoch, "iteration": run.state.iteration, "percent": self.percent}
        path = self.folder / "accuracy.json"
        on_first_rank(f"cannot write {path}", lambda: path.write_text(json.dumps(note) + "\n"))
        print_rank_0(f"  the best model so far ({self.percent:.4f} %, epoch {epoch}) is in {self.folder}")


def _percent_in(folder: Path) -> float:
    note = folder / "accuracy.json"
    return json.loads(note.read_text())["percent"] if note.exists() and checkpoint_exists(folder) else -1.0


@dataclass
class EndOfEpoch:
    """An action of the training loop."""

    per_epoch: int
    measure: Measure
    best: Best

    def __call__(self, run: Run, result: StepResult) -> None:
        """Measure and save when an epoch is over."""
        epoch, step = divmod(run.state.iteration, self.per_epoch)
        if step:
            return
        with interval_paused(run):
            self.best.update(run, self.measure(run, epoch - 1), epoch - 1)
        save(run)
