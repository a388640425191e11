"""`--task LM_EVAL`: tasks of EleutherAI's lm-eval on a GPT from any checkpoint, in any layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.collective import broadcast_from_first
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
from megatron.training.checkpoint.load import load_run
from megatron.training.initialize import close_program
from megatron.training.settings import refuse_unless
from pretrain_gpt import model_provider
from tasks.checkpoints import require_checkpoint, require_same_tokenizer
from tasks.report import report_results


def prepare(args: Any) -> Callable[[], None]:
    """What runs the harness; its tasks have been looked up."""
    refuse_unless(
        importlib.util.find_spec("lm_eval") is not None,
        "--task LM_EVAL needs the package lm-eval: pip install -e '.[eval]' in the repository",
    )
    refuse_unless(args.lm_eval_tasks, "--task LM_EVAL needs --lm-eval-tasks, names of tasks of lm-eval")
    require_checkpoint(args)
    return partial(_run, args, find_tasks(args))


def find_tasks(args: Any) -> Any:
    """lm-eval's manager of tasks; raises `ConfigurationError` if it does not know one of them."""
    from lm_eval.tasks import TaskManager

    if args.lm_eval_include_path:  # reading the harness' own thousands takes a minute on a slow machine
        own = TaskManager(include_path=args.lm_eval_include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in args.lm_eval_tasks):
            return own
    manager = TaskManager(include_path=args.lm_eval_include_path)
    unknown = [name for name in args.lm_eval_tasks if not manager.match_tasks([name])]
    refuse_unless(
        not unknown,
        f"--lm-eval-tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists those it has, and "
        "--lm-eval-include-path adds a folder of your own",
    )
    return manager


def _run(args: Any, manager: Any) -> None:
    from lm_eval import simple_evaluate

    from tasks.lm_eval_harness.adapter import GPTOfHarness

    initialize_megatron(parsed_args=args, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    args = get_args()
    require_same_tokenizer(args, "load")
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    found = simple_evaluate(
        GPTOfHarness(model, get_tokenizer(), length=args.seq_length, batch_size=args.micro_batch_size),
        tasks=manager.match_tasks(args.lm_eval_tasks),
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    # The harness gives its results to the first process of a machine only.
    for task, metrics in broadcast_from_first(numbers(found)).items():
        report_results(task, metrics)
    close_program()


def numbers(found: Any) -> dict[str, dict[str, float]]:
    """Of each task, the metrics that are numbers; nothing where the harness gives no results."""
    results = found["results"] if found else {}
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        for task, metrics in results.items()
    }
