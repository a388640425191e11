"""The data of a training command line, without the training: settings, tokenizer and datasets in one process."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron.training
from megatron.core import parallel_state
from megatron.training import training
from megatron.training.arguments import parse_args
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.rules.layout import PARALLEL_SIZES
from megatron.training.settings import configuration_errors_end_the_program
from megatron.training.setup import build_train_valid_test_datasets


@dataclass(frozen=True)
class RunData:
    """What a run would read."""

    args: Any
    tokenizer: Any
    datasets: dict[str, Any]
    """Of train, valid and test; None for a split without data. Several validation sets are valid_0, valid_1, ..."""


def load_run_data(program: str, flags: list[str], num_ranks: int | None = None) -> RunData:
    """The settings and datasets of `PROGRAM FLAGS` on `num_ranks` ranks; indices that are missing are built.

    Everything that the program prints goes to stderr.

    Args:
        program: path of a program that calls `pretrain`.
        num_ranks: None: as WORLD_SIZE says, else the fewest ranks that the layout allows.
    """
    with contextlib.redirect_stdout(sys.stderr), _command_line([program, *flags]):
        call = _arguments_of_pretrain(program)
        _set_num_ranks(call.get("extra_args_provider"), num_ranks)
        initialize_megatron(
            call.get("extra_args_provider"),
            call.get("args_defaults"),
            skip_mpu_initialization=True,
            for_training=True,
        )
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()  # one rank that is all stages: it reads everything
            splits = build_train_valid_test_datasets(call["train_valid_test_dataset_provider"])
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    datasets: dict[str, Any] = {}
    for name, dataset in zip(("train", "valid", "test"), splits):
        several = isinstance(dataset, list)
        datasets |= {f"{name}_{i}": each for i, each in enumerate(dataset)} if several else {name: dataset}
    return RunData(get_args(), get_tokenizer(), datasets)


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = before


def _arguments_of_pretrain(program: str) -> dict[str, Any]:
    """What the program calls `pretrain` with, found by running it with another `pretrain`."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(training.pretrain)

    def note(*args: Any, **kwargs: Any) -> None:
        calls.append(signature.bind(*args, **kwargs).arguments)

    original = training.pretrain
    training.pretrain = megatron.training.pretrain = note  # type: ignore[assignment]
    sys.path.insert(0, str(Path(program).resolve().parent))
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        sys.path.pop(0)
        training.pretrain = original
        del megatron.training.pretrain
    if len(calls) != 1:
        raise ValueError(f"{program} is no training program: it calls pretrain(...) {len(calls)} times")
    return calls[0]


def _set_num_ranks(extra_args_provider: Any, num_ranks: int | None) -> None:
    if num_ranks is None and "WORLD_SIZE" in os.environ:
        return
    with configuration_errors_end_the_program():
        args = parse_args(extra_args_provider)
    if num_ranks is None and args.global_batch_size is None:
        sys.stderr.write(
            "the global batch, and with it the number of samples, follows from the number of ranks: give "
            "--ranks or --global-batch-size\n"
        )
    os.environ["WORLD_SIZE"] = str(num_ranks or math.prod(getattr(args, name) for name in PARALLEL_SIZES))
