"""`--task LM_EVAL`: tasks of EleutherAI's lm-eval on a GPT from any checkpoint, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.initialize import close_program
from megatron.training.settings import refuse_unless
from pretrain_gpt import model_provider
from tasks.checkpoints import require_checkpoint
from tasks.lm_eval_harness.harness import HarnessTasks, find_tasks, measure
from tasks.report import report_results


def prepare(args: Any) -> Callable[[], None]:
    """What runs the harness; its tasks have been looked up."""
    refuse_unless(args.lm_eval_tasks, "--task LM_EVAL needs --lm-eval-tasks, names of tasks of lm-eval")
    tasks = find_tasks(args.lm_eval_tasks, args.lm_eval_include_path, "--lm-eval-tasks")
    require_checkpoint(args)
    return partial(_run, args, tasks)


def _run(args: Any, tasks: HarnessTasks) -> None:
    initialize_megatron(parsed_args=args, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    args = get_args()
    require_same_tokenizer(args, "load")
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    for task, metrics in measure(tasks, model, args, get_tokenizer()).items():
        report_results(task, metrics)
    close_program()
