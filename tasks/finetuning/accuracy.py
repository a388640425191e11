"""How often a classifier is right, on each of several sets and on all together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.training import get_args, print_rank_0
from megatron.training.global_vars import get_trackers
from megatron.training.utils import print_rank_last
from tasks.finetuning.classifier import encoder_of, probabilities
from tasks.finetuning.corpora import Corpus
from tasks.finetuning.examples import ExampleSet


@dataclass(frozen=True)
class Count:
    """Right answers among all."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100.0 * self.correct / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"correct / total = {self.correct} / {self.total} = {self.percent:.4f} %"


def answers(model: list[nn.Module], one: ExampleSet, corpus: Corpus) -> Tensor:
    """[examples, classes]: the probabilities of a set; see `probabilities`."""
    return probabilities(
        model,
        one.examples,
        encoder_of(corpus),
        num_classes=corpus.num_classes,
        batch_size=get_args().micro_batch_size,
    )


def measure(
    model: list[nn.Module], sets: Sequence[ExampleSet], corpus: Corpus, epoch: int, iteration: int
) -> tuple[Count, dict[str, Tensor]]:
    """The right answers of all sets that have labels, and the probabilities of each set; the same on every rank.

    Prints both apart and together on the last rank, and gives them to the trackers. All ranks call this.
    """
    print_rank_0("calculating metrics ...")
    counts: dict[str, Count] = {}
    found: dict[str, Tensor] = {}
    for one in sets:
        begin = time.time()
        found[one.name] = answers(model, one, corpus)
        seconds = f"elapsed time (sec): {time.time() - begin:.3f}"
        if one.has_labels:
            labels = torch.tensor([example.label for example in one.examples])
            counts[one.name] = Count(int((found[one.name].argmax(-1) == labels).sum()), len(labels))
            print_rank_last(f" > |epoch: {epoch}| metrics for {one.name}: {counts[one.name]}, {seconds}")
        else:
            print_rank_last(f" > |epoch: {epoch}| answers for {one.name}, which has no labels, {seconds}")
    overall = Count(sum(count.correct for count in counts.values()), sum(count.total for count in counts.values()))
    if counts:
        print_rank_last(f" >> |epoch: {epoch}| overall: {overall}")
        _track(corpus.name, counts | {"overall": overall}, epoch, iteration)
    return overall, found


def _track(task: str, counts: dict[str, Count], epoch: int, iteration: int) -> None:
    trackers = get_trackers()
    if trackers is None:
        return
    shares = {f"accuracy of {name}": count.percent / 100 for name, count in counts.items()}
    trackers.log({f"{task} {name}": share for name, share in shares.items()}, iteration)
    trackers.record({"task": task, "epoch": epoch, "iteration": iteration} | shares)


def write_predictions(path: Path, sets: Sequence[ExampleSet], found: dict[str, Tensor]) -> None:
    """A list of, for each set, its name and (probabilities [n, classes], labels [n], ids [n]). All ranks call this."""
    contents = [
        (
            one.name,
            (
                found[one.name].float(),
                torch.tensor([example.label for example in one.examples]),
                torch.tensor([example.uid for example in one.examples]),
            ),
        )
        for one in sets
    ]
    on_first_rank(f"cannot write {path}", lambda: torch.save(contents, path))
    print_rank_0(f"predictions are in {path}")
