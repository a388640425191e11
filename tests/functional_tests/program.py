"""Runs the real programs inside the worker pool: the same file, the same flags, no second start-up of Python."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
from tests.worker_pool import run_ranks

ROOT = Path(__file__).resolve().parents[2]

TINY = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 60
    --num-workers 0 --eval-iters 0 --log-interval 1 --no-progress-bar --adam-eps 1e-5
""".split()
"""A four-layer GPT on made-up data; its 61 words leave padding in every layout.

Adam divides by the size of a gradient: with a tiny epsilon, gradients that are zero but for the order of a sum would
move weights as far as any, and layouts would drift apart within a few steps (a hundred times as far as with this one).
"""


def pretrain_gpt(world_size: int, flags: str | list[str], *, tiny: bool = True) -> list[str]:
    """Run pretrain_gpt.py on `world_size` ranks; what each of them printed."""
    words = flags.split() if isinstance(flags, str) else flags
    return run_ranks(world_size, run_program, "pretrain_gpt.py", [*(TINY if tiny else []), *words])


def run_program(program: str, argv: list[str]) -> str:
    """Run a program on this rank as if started by torchrun; what it printed."""
    printed = io.StringIO()
    before = sys.argv
    sys.argv = [program, *argv]
    small = mock.patch.object(MockGPTLowLevelDataset, "size", 3000)  # an index of all 100 000 takes a second
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), allow_clean_exit(), small:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}\n{printed.getvalue()[-2000:]}") from error
    finally:
        sys.argv = before
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    return printed.getvalue()


@contextlib.contextmanager
def allow_clean_exit() -> Iterator[None]:
    """Exit code 0 is how a run that was asked to stop ends."""
    try:
        yield
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of training iterations, at full precision."""
    return [row for row in metrics(path) if "lm loss" in row]


def refusals(program: str, command_lines: list[list[str]]) -> list[str]:
    """What a program says to command lines that it refuses, one after the other on this rank."""
    from megatron.core import parallel_state
    from megatron.training.global_vars import destroy_global_vars

    said = []
    for argv in command_lines:
        try:
            said.append(f"not refused: {run_program(program, argv)}")
        except RuntimeError as error:
            said.append(str(error))
        parallel_state.destroy_model_parallel()
        destroy_global_vars()
    return said
