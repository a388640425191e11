"""Measure a model as it is, or finetune a BERT and measure it: `tasks/main.py --task NAME FLAGS`.

    python tasks/main.py --task WIKITEXT103 --valid-data wikitext.txt --load checkpoints --use-checkpoint-args \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --micro-batch-size 8

Under torchrun the model is spread as the flags say, however it was spread when it was trained.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the programs and packages beside this folder

from megatron.training.arguments import parse_args
from megatron.training.errors import exit_at_once_on_error
from megatron.training.settings import configuration_errors_end_the_program
from tasks.arguments import add_task_arguments, refuse_flags_of_other_tasks
from tasks.finetuning import run as finetuning
from tasks.lm_eval_harness import run as lm_eval_harness
from tasks.retrieval import finetune as retrieval_finetune
from tasks.retrieval import run as retrieval
from tasks.zeroshot_gpt import run as zeroshot

TASKS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "WIKITEXT103": zeroshot.prepare,
    "LAMBADA": zeroshot.prepare,
    "MNLI": finetuning.prepare,
    "QQP": finetuning.prepare,
    "RACE": finetuning.prepare,
    "RETRIEVER-EVAL": retrieval.prepare,
    "ICT-ZEROSHOT-NQ": retrieval.prepare,
    "RET-FINETUNE-NQ": retrieval_finetune.prepare,
    "LM_EVAL": lm_eval_harness.prepare,
}
"""Task -> (settings, not yet checked) -> what runs it. The task's files are read, and refused, before anything else."""


def main() -> None:
    with configuration_errors_end_the_program():
        args = parse_args(add_task_arguments)
        refuse_flags_of_other_tasks(args)
        run = TASKS[args.task](args)
    run()


if __name__ == "__main__":
    with exit_at_once_on_error():
        main()
