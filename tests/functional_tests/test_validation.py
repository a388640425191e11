"""Validation on whole data sets, and on several of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.functional_tests.program import TINY, metrics, run_program
from tests.unit_tests.datasets.data_files import random_documents, write_dataset
from tests.worker_pool import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, size) in enumerate({"train": 80, "plays": 23, "laws": 9}.items()):
        write_dataset(folder / name, random_documents(size, seed=seed))
    return folder


def run(data: Path, world_size: int, more: str, output: Path) -> tuple[dict[str, float], str]:
    """Losses of the last validation at full precision, and what the last rank printed."""
    flags = [word for word in TINY if word != "--mock-data"]
    flags += f"--vocab-size 99 --num-layers 1 --train-data-path {data / 'train'} --train-iters 2".split()
    flags += f"--data-cache-path {data / 'cache'} --metrics-jsonl {output} {more}".split()
    printed = run_ranks(world_size, run_program, "pretrain_gpt.py", flags)[-1]
    found: dict[str, float] = {}
    for row in metrics(output):
        found |= {name: value for name, value in row.items() if "validation" in name}
    return found, printed


def test_a_full_pass_counts_each_sample_once_in_any_layout(data: Path, tmp_path: Path) -> None:
    full = f"--valid-data-path {data / 'plays'} {data / 'laws'} --full-validation --multiple-validation-sets"
    one, printed = run(data, 1, f"{full} --skip-train --global-batch-size 1", tmp_path / "one")
    assert set(one) == {"lm loss validation plays", "lm loss validation laws"}
    assert "on validation set plays | lm loss value" in printed and "on validation set laws | " in printed
    sizes = {int(line.split()[2]) for line in printed.split("\n") if line.startswith("Evaluating on ")}
    assert len(sizes) == 2 and min(sizes) > 0  # no samples that only fill up
    assert any(size % 8 for size in sizes)  # some batches are filled up now
    found, _ = run(data, 2, f"{full} --skip-train --global-batch-size 8", tmp_path / "two")
    assert found == pytest.approx(one, rel=1e-6)
    pipeline = "--pipeline-model-parallel-size 2 --num-layers 2 --eval-interval 1"
    _, printed = run(data, 2, f"{full} {pipeline}", tmp_path / "pipeline")
    losses = dict(re.findall(r"validation loss at (.*?) \| lm loss value: (\S+)", printed))
    assert losses["iteration 1 on plays"] != losses["iteration 2 on plays"]
    assert losses["iteration 2 on plays"] == losses["iteration 2 on validation set plays"]  # each pass starts anew
    assert losses["iteration 2 on laws"] == losses["iteration 2 on validation set laws"]


def test_several_sets_share_the_batches_of_an_evaluation(data: Path, tmp_path: Path) -> None:
    both = f"--valid-data-path {data / 'plays'} {data / 'laws'} --multiple-validation-sets --eval-iters 2"
    found, printed = run(data, 1, f"{both} --eval-interval 1", tmp_path / "both")
    assert printed.count("Evaluating on 8 samples") == 2
    for name in ("plays", "laws"):
        alone, _ = run(data, 1, f"--valid-data-path {data / name} --eval-iters 2 --eval-interval 1", tmp_path / name)
        assert found[f"lm loss validation {name}"] == alone["lm loss validation"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--multiple-validation-sets", "needs the sets: name them with --valid-data-path"),
        ("--full-validation --dataloader-type external", "has none that is known"),
    ],
)
def test_what_has_no_meaning_is_refused(flags: str, message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        run(data, 1, flags, tmp_path / "none")
