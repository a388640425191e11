"""`--task WIKITEXT103` and `--task LAMBADA`, on a GPT from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.initialize import close_program
from pretrain_gpt import model_provider
from tasks.checkpoints import require_checkpoint
from tasks.files import one_file
from tasks.report import report_results
from tasks.zeroshot_gpt.evaluate import MEASUREMENTS, ZeroShot, measure


def prepare(args: Any) -> Callable[[], None]:
    """What runs the task of `--task`; its file has been read."""
    measurement = MEASUREMENTS[args.task](one_file(args.valid_data, "--valid-data"), "--valid-data")
    require_checkpoint(args)
    return lambda: _run(args, measurement)


def _run(args: Any, measurement: ZeroShot) -> None:
    initialize_megatron(parsed_args=args, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    require_same_tokenizer(get_args(), "load")
    texts = measurement.texts(get_args(), get_tokenizer())
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(get_args(), model, None, None)
    report_results(measurement.name, measure(measurement, texts, model))
    close_program()
