"""The flags of tasks, and which task reads which."""

from __future__ import annotations

import argparse
from typing import Any

from megatron.training.settings import refuse_unless, was_given

FINETUNING = ("epochs", "keep_last", "train_data", "valid_data")
RETRIEVAL = ("qa_data_dev", "qa_data_test", "faiss_use_gpu", "faiss_match", "faiss_topk_retrievals")
NEGATIVES = ("train_with_neg", "train_hard_neg", "val_av_rank_hard_neg", "val_av_rank_other_neg")
READ_BY: dict[str, tuple[str, ...]] = {
    "WIKITEXT103": ("valid_data", "overlapping_eval"),
    "LAMBADA": ("valid_data", "strict_lambada"),
    "MNLI": FINETUNING,
    "QQP": FINETUNING,
    "RACE": FINETUNING,
    "RETRIEVER-EVAL": RETRIEVAL,
    "ICT-ZEROSHOT-NQ": RETRIEVAL,
    "RET-FINETUNE-NQ": ("epochs", "train_data", "valid_data", *NEGATIVES),
    "LM_EVAL": ("lm_eval_tasks", "lm_eval_include_path", "num_fewshot", "limit"),
}
"""Task -> the task flags that it reads."""


def add_task_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of tasks to `parser`."""
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--task", required=True, choices=tuple(READ_BY), metavar="NAME", help=f"one of {names_of_tasks()}"
    )
    group.add_argument("--epochs", type=int, help="passes over the training data; 0 only evaluates")
    group.add_argument("--keep-last", action="store_true", help="train on the last, incomplete batch of an epoch too")
    group.add_argument("--train-data", nargs="+", metavar="PATH", help="files, for RACE folders, to train on")
    group.add_argument("--valid-data", nargs="*", metavar="PATH", help="files, for RACE folders, to evaluate on")
    group.add_argument("--overlapping-eval", type=int, default=32, help="tokens by which WIKITEXT103 moves its window")
    group.add_argument(
        "--strict-lambada", action="store_true", help="LAMBADA: all tokens of the last word must be right"
    )
    group.add_argument("--qa-data-dev", metavar="FILE", help="questions and their answers to develop on")
    group.add_argument("--qa-data-test", metavar="FILE", help="questions and their answers to test on")
    group.add_argument("--faiss-use-gpu", action="store_true", help="search the passages on the accelerator")
    group.add_argument(
        "--faiss-match", choices=("string", "regex"), default="string", help="what the answers are that a passage has"
    )
    group.add_argument("--faiss-topk-retrievals", type=int, default=100, help="passages retrieved for each question")
    group.add_argument("--train-with-neg", action="store_true", help="learn from passages that do not answer, too")
    group.add_argument("--train-hard-neg", type=int, default=0, help="of these, how many for each question")
    group.add_argument("--val-av-rank-hard-neg", type=int, default=30, help="hard negatives of a question to rank with")
    group.add_argument("--val-av-rank-other-neg", type=int, default=30, help="other negatives of a question to do so")
    group.add_argument("--lm-eval-tasks", nargs="+", metavar="NAME", help="tasks of lm-eval for LM_EVAL")
    group.add_argument("--lm-eval-include-path", metavar="DIR", help="folder with further tasks of lm-eval")
    group.add_argument("--num-fewshot", type=int, help="LM_EVAL: solved examples before each question")
    group.add_argument("--limit", type=int, help="LM_EVAL: only so many samples of each task")
    return parser


def names_of_tasks() -> str:
    """All tasks, for messages."""
    return ", ".join(READ_BY)


def refuse_flags_of_other_tasks(args: Any) -> None:
    """Raises `ConfigurationError` if a flag is given that `--task` does not read."""
    for name in sorted({name for names in READ_BY.values() for name in names}):
        readers = [task for task, names in READ_BY.items() if name in names]
        refuse_unless(
            args.task in readers or not was_given(args, name),
            f"--{name.replace('_', '-')} has no meaning for --task {args.task}; {', '.join(readers)} read it",
        )
