"""Running tasks of lm-eval on a model of ours. Only what is called imports the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.collective import broadcast_from_first
from megatron.training.settings import refuse_unless


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that lm-eval knows."""

    names: Sequence[str]
    manager: Any
    """lm-eval's `TaskManager`."""


def require_package() -> None:
    """Raises `ConfigurationError` if lm-eval is not installed."""
    refuse_unless(
        importlib.util.find_spec("lm_eval") is not None,
        "LM_EVAL needs the package lm-eval: pip install -e '.[eval]' in the repository",
    )


def find_tasks(names: Sequence[str], include_path: str | None, flag: str) -> HarnessTasks:
    """The tasks of these names.

    Args:
        include_path: folder with tasks beside the harness' own.
        flag: which names them, for messages.

    Raises:
        ConfigurationError: the package is missing, or does not know one of them.
    """
    require_package()
    from lm_eval.tasks import TaskManager

    if include_path:  # reading the harness' own thousands takes a minute on a slow machine
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return HarnessTasks(names, own)
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    refuse_unless(
        not unknown,
        f"{flag}: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists those it has, and "
        "--lm-eval-include-path adds a folder of your own",
    )
    return HarnessTasks(names, manager)


def measure(tasks: HarnessTasks, model: list[nn.Module], args: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Task -> its metrics, on every rank. All ranks call this.

    Args:
        args: `seq_length`, `micro_batch_size`, `num_fewshot` and `limit` count.
    """
    from lm_eval import simple_evaluate

    from tasks.lm_eval_harness.adapter import GPTOfHarness

    found = simple_evaluate(
        GPTOfHarness(model, tokenizer, length=args.seq_length, batch_size=args.micro_batch_size),
        tasks=tasks.manager.match_tasks(list(tasks.names)),
        task_manager=tasks.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    # The harness gives its results to the first process of a machine only.
    return broadcast_from_first(numbers(found))


def numbers(found: Any) -> dict[str, dict[str, float]]:
    """Of each task, the metrics that are numbers; nothing where the harness gives no results."""
    results = found["results"] if found else {}
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in results.items()
    }
