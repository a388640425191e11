"""Finetuning a BERT on MNLI, QQP or RACE, with the training loop of `pretrain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.enums import ModelType
from megatron.training import get_args, get_model, initialize_megatron, print_rank_0
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.paths import checkpoint_exists
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.checkpoint.save import save_run
from megatron.training.initialize import close_program
from megatron.training.periodic import interval_paused, save
from megatron.training.run import Run
from megatron.training.settings import Source, refuse_unless
from megatron.training.train_step import StepResult
from megatron.training.training import close, set_up, train_to_the_end
from tasks.checkpoints import require_checkpoint
from tasks.files import matching
from tasks.finetuning.accuracy import Count, measure, write_predictions
from tasks.finetuning.classifier import encoder_of, forward_step, model_provider_of
from tasks.finetuning.corpora import CORPORA, Corpus, short_name
from tasks.finetuning.examples import Epochs, Example, ExampleSet, Repeated, batches_per_epoch
from tasks.finetuning.pretrained import load_start

DEFAULTS = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "bert"}
PREDICTIONS = "predictions.pt"
BEST = "best"


@dataclass(frozen=True)
class Finetuning:
    """What a run learns from and is measured on."""

    corpus: Corpus
    train: list[Example]
    """Empty in a run that only evaluates."""
    valid: list[ExampleSet]
    per_epoch: int = 0
    """Steps of an epoch."""


# --- before anything is touched -------------------------------------------------------------------


def prepare(args: Any) -> Callable[[], None]:
    """What runs the task of `--task`; its files have been read."""
    corpus = CORPORA[args.task]
    refuse_unless(args.epochs is not None, f"--task {args.task} needs --epochs; 0 only evaluates")
    refuse_unless(args.epochs >= 0, f"--epochs ({args.epochs}) must not be negative")
    refuse_unless(args.valid_data, f"--task {args.task} needs --valid-data, what to evaluate on")
    valid = read_sets(corpus, args.valid_data)
    if not args.epochs:
        require_checkpoint(args)
        return partial(evaluate, args, Finetuning(corpus, [], valid))
    for one in valid:
        refuse_unless(
            one.has_labels, f"--valid-data {one.name} has no labels: it can be evaluated with --epochs 0 only"
        )
    pretrained = args.pretrained_checkpoint
    refuse_unless(
        pretrained is None or hf_directory(pretrained) is not None or checkpoint_exists(pretrained),
        f"--pretrained-checkpoint {pretrained} holds no checkpoint",
    )
    train = read_training(corpus, args)
    per_epoch = set_length(args, len(train))
    return partial(finetune, args, Finetuning(corpus, train, valid, per_epoch))


def read_sets(corpus: Corpus, words: list[str]) -> list[ExampleSet]:
    """The validation sets, each with a name of its own."""
    paths = [path for word in words for path in matching(word, "--valid-data")]
    names = [short_name(path, corpus.name) for path in paths]
    names = [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, 1)]
    return [ExampleSet(name, corpus.read(path, f"--valid-data {path}")) for name, path in zip(names, paths)]


def read_training(corpus: Corpus, args: Any) -> list[Example]:
    """The training examples of all paths, one after the other."""
    refuse_unless(args.train_data, f"--task {args.task} with --epochs {args.epochs} needs --train-data")
    examples: list[Example] = []
    for path in (path for word in args.train_data for path in matching(word, "--train-data")):
        found = ExampleSet(str(path), corpus.read(path, f"--train-data {path}"))
        refuse_unless(found.has_labels, f"--train-data {path} has no labels; there is nothing to learn from it")
        examples += found.examples
    return examples


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


# --- the run --------------------------------------------------------------------------------------


def evaluate(args: Any, task: Finetuning) -> None:
    """Measure the model of `--load`, and keep its answers there."""
    initialize_megatron(parsed_args=args, args_defaults=DEFAULTS)
    args = get_args()
    require_same_tokenizer(args, "load")
    model = get_model(model_provider_of(task.corpus), wrap_with_ddp=False)
    state = load_run(args, model, None, None)
    _, found = measure(model, task.valid, task.corpus, epoch=-1, iteration=state.iteration)
    write_predictions(Path(args.load) / PREDICTIONS, task.valid, found)
    close_program()


def finetune(args: Any, task: Finetuning) -> None:
    """Train for `--epochs`; after each of them measure, save, and keep the best model apart."""
    initialize_megatron(parsed_args=args, args_defaults=DEFAULTS, for_training=True)
    provider: Any = partial(provide_data, task)
    provider.is_distributed = True
    model_provider = model_provider_of(task.corpus)
    run = set_up(provider, model_provider, ModelType.encoder_or_decoder, forward_step, load_start)
    train_to_the_end(run, [EndOfEpoch(task, Best.so_far(run.args))])
    close(run)


def provide_data(task: Finetuning, num_samples: list[int]) -> tuple[Epochs, Repeated, None]:
    """Data sets as `pretrain` takes them: all validation sets together make one."""
    args, encode = get_args(), encoder_of(task.corpus)
    train = Epochs(
        task.train,
        encode,
        epochs=args.epochs,
        batch_size=args.global_batch_size,
        keep_last=args.keep_last,
        seed=args.seed,
    )
    everything = [example for one in task.valid for example in one.examples]
    return train, Repeated(everything, encode, num_samples[1]), None


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

    task: Finetuning
    best: Best

    def __call__(self, run: Run, result: StepResult) -> None:
        """Measure and save when an epoch is over."""
        epoch, step = divmod(run.state.iteration, self.task.per_epoch)
        if step:
            return
        with interval_paused(run):
            overall, _ = measure(run.model, self.task.valid, self.task.corpus, epoch - 1, run.state.iteration)
            self.best.update(run, overall, epoch - 1)
        save(run)
