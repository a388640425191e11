"""Bad input ends a run with one clear error and a non-zero exit on all ranks; nothing hangs, nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from tests.functional_tests.program import ROOT, TINY, pretrain_gpt, run_program
from tests.worker_pool import RankFailure, run_ranks

MODEL = [word for word in TINY if word != "--mock-data"]


def refusal(world_size: int, *flags: str) -> str:
    """What a run that must fail says; it fails fast, on every rank."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(world_size, run_program, "pretrain_gpt.py", [*MODEL, "--train-iters", "2", *flags])
    return str(failure.value)


def write_dataset(folder: Path, documents: list[list[int]]) -> str:
    prefix = str(folder / "data")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(get_idx_path(prefix))
    return prefix


def test_sequence_longer_than_the_data(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, [[1, 2, 3]])
    output = refusal(2, "--data-path", prefix, "--split", "1,0,0")
    assert "sequence" in output and prefix in output


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, [[7] * 100 + [500]] * 10)
    output = refusal(2, "--data-path", prefix, "--split", "1,0,0")
    assert "500" in output and "ids 0 to 60" in output and prefix in output


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_damaged_data(tmp_path: Path, damage: str) -> None:
    prefix = write_dataset(tmp_path, [[1] * 50] * 20)
    index = Path(get_idx_path(prefix))
    if damage == "truncated":
        index.write_bytes(index.read_bytes()[:60])
    elif damage == "foreign":
        index.write_bytes(b"not an index at all" * 10)
    else:
        index.unlink()
    output = refusal(2, "--data-path", prefix, "--split", "1,0,0")
    assert prefix in output


def test_world_size_that_does_not_fit() -> None:
    """As a user sees it, by a real launch: one message, no traceback of ours, no process left."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "pretrain_gpt.py"]
        + [*MODEL, "--train-iters", "2", "--mock-data", "--tensor-model-parallel-size", "4"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert output.count("tensor_model_parallel_size") + output.count("--tensor-model-parallel-size") >= 1
    assert "world" in output.lower()
    assert "megatron/training" not in output  # no traceback of ours


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    output = refusal(2, "--mock-data", "--save", str(blocker / "save"), "--save-interval", "1")
    assert str(blocker) in output


def test_checkpoint_of_another_model_lists_the_differences(tmp_path: Path) -> None:
    pretrain_gpt(1, f"--train-iters 2 --save {tmp_path} --save-interval 2")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    output = refusal(
        2, "--mock-data", "--load", str(tmp_path), "--ffn-hidden-size", "64", "--tensor-model-parallel-size", "2"
    )
    assert "mlp.linear_fc1.weight" in output and "64" in output and "128" in output
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_unknown_flag_suggests_the_right_one() -> None:
    output = refusal(1, "--mock-data", "--tensor-model-paralel-size", "2")
    assert "did you mean" in output and "--tensor-model-parallel-size" in output


def test_capability_that_is_not_built_is_refused() -> None:
    output = refusal(1, "--mock-data", "--use-legacy-models")
    assert "--use-legacy-models" in output and "not built yet" in output
