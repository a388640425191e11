"""`--eval-tasks`: tasks that a GPT does as it is, every so many steps of its training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from megatron.training import get_args, get_tokenizer
from megatron.training.checkpoint.state import rng_preserved
from megatron.training.periodic import interval_paused
from megatron.training.run import Action, Run
from megatron.training.settings import ConfigurationError, configuration_errors_end_the_program, refuse_unless
from megatron.training.train_step import StepResult
from tasks.files import one_file
from tasks.lm_eval_harness import harness
from tasks.report import report_results
from tasks.zeroshot_gpt import evaluate

LM_EVAL = "LM_EVAL"
Results = dict[str, dict[str, float]]
Measure = Callable[[list[nn.Module]], Results]
"""This rank's model chunks -> task -> its results, the same on every rank. All ranks call it."""


def add_eval_task_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of tasks during training to `parser`."""
    group = parser.add_argument_group("tasks during training")
    group.add_argument(
        "--eval-tasks",
        nargs="+",
        type=known_task,
        default=[],
        metavar="TASK=WHAT",
        help=f"tasks to run while training: {' or '.join(evaluate.MEASUREMENTS)}=FILE, or {LM_EVAL}=NAME, of lm-eval",
    )
    group.add_argument(
        "--eval-tasks-interval", type=number_of_steps, default=1000, help="steps between runs of --eval-tasks"
    )
    group.add_argument(
        "--overlapping-eval", type=int, default=32, help="tokens by which WIKITEXT103 of --eval-tasks moves its window"
    )
    group.add_argument(
        "--strict-lambada", action="store_true", help="LAMBADA of --eval-tasks: all of the last word must be right"
    )
    group.add_argument("--lm-eval-include-path", metavar="DIR", help="folder with further tasks of lm-eval")
    group.add_argument("--num-fewshot", type=int, help="LM_EVAL of --eval-tasks: solved examples before each question")
    group.add_argument("--limit", type=int, help="LM_EVAL of --eval-tasks: only so many samples of each task")
    return parser


def known_task(word: str) -> str:
    """`word` if it names a task and what it reads; the file is read, to be refused before anything is done.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    try:
        task, what = _parted(word)
        if task == LM_EVAL:
            harness.require_package()
        else:
            _zero_shot(task, what)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word


def number_of_steps(word: str) -> int:
    """The number, at least 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"a number of steps of at least 1 is expected, found {word}")
    return int(word)


def _parted(word: str) -> tuple[str, str]:
    task, _, what = word.partition("=")
    known = [*evaluate.MEASUREMENTS, LM_EVAL]
    refuse_unless(task in known and what, f"TASK=WHAT is expected, where TASK is {', '.join(known)}; found {word}")
    return task, what


def _zero_shot(task: str, what: str) -> evaluate.ZeroShot:
    flag = f"--eval-tasks {task}:"
    return evaluate.MEASUREMENTS[task](one_file([what], flag), flag)


def eval_task_actions() -> list[Action]:
    """What the training loop does for `--eval-tasks`; nothing without.

    The tasks' files are read, and cut into what the model is asked, once.
    """
    args = get_args()
    if not args.eval_tasks:
        return []
    with configuration_errors_end_the_program():
        parted = [_parted(word) for word in args.eval_tasks]
        measures = [_measure_of(_zero_shot(task, what)) for task, what in parted if task != LM_EVAL]
        names = [what for task, what in parted if task == LM_EVAL]
        if names:
            tasks = harness.find_tasks(names, args.lm_eval_include_path, f"--eval-tasks {LM_EVAL}")
            measures.append(lambda model: harness.measure(tasks, model, args, get_tokenizer()))
    return [EvalTasks(measures, args.eval_tasks_interval)]


def _measure_of(zero_shot: evaluate.ZeroShot) -> Measure:
    texts = zero_shot.texts(get_args(), get_tokenizer())
    return lambda model: {zero_shot.name: evaluate.measure(zero_shot, texts, model)}


@dataclass(frozen=True)
class EvalTasks:
    """An action of the training loop: measure every `interval` steps, without a trace in what is trained."""

    measures: Sequence[Measure]
    interval: int

    def __call__(self, run: Run, result: StepResult) -> None:
        if run.state.iteration % self.interval:
            return
        run.progress.clear()
        with interval_paused(run), rng_preserved():  # lm-eval seeds the generators
            for measure in self.measures:
                for task, results in measure(run.model).items():
                    report_results(task, results, run.state.iteration)
