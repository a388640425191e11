"""Finetuning a BERT on MNLI, QQP or RACE, with the training loop of `pretrain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.training import get_args, get_model, initialize_megatron
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.paths import checkpoint_exists
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.initialize import close_program
from megatron.training.run import Run
from megatron.training.settings import refuse_unless
from tasks.checkpoints import require_checkpoint
from tasks.files import matching
from tasks.finetuning.accuracy import Count, measure, write_predictions
from tasks.finetuning.classifier import encoder_of, forward_step, model_provider_of
from tasks.finetuning.corpora import CORPORA, Corpus, short_name
from tasks.finetuning.examples import Epochs, Example, ExampleSet, Repeated
from tasks.finetuning.loop import set_length, train_for_epochs
from tasks.finetuning.pretrained import load_start

DEFAULTS = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "bert"}
PREDICTIONS = "predictions.pt"


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
    """Train for `--epochs`, measuring after each of them."""
    initialize_megatron(parsed_args=args, args_defaults=DEFAULTS, for_training=True)

    def overall(run: Run, epoch: int) -> Count:
        return measure(run.model, task.valid, task.corpus, epoch, run.state.iteration)[0]

    model_provider = model_provider_of(task.corpus)
    train_for_epochs(partial(provide_data, task), model_provider, forward_step, load_start, task.per_epoch, overall)


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
