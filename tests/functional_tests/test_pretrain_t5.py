"""pretrain_t5.py on real sentences: it learns, alike in every layout, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.golden_curves import compare_with_golden
from tests.functional_tests.program import run_program, train_rows
from tests.functional_tests.sentences import write_sentences
from tests.worker_pool import run_ranks

STEPS = 8
NUMBERS = ("lm loss", "grad-norm")
LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp1+1-dp2-distopt": (4, "--encoder-pipeline-model-parallel-size 1 --use-distributed-optimizer"),
}
"""On real data; `equivalence/encoders.py` has all of them on made-up samples."""
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sentences")
    found = write_sentences(directory)
    return f"--data-path {found['data']} --vocab-file {found['vocab']} --data-cache-path {directory / 'cache'}"


TINY = (
    "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 4 --kv-channels 12 "
    "--ffn-hidden-size 96 --encoder-seq-length 48 --decoder-seq-length 32 --max-position-embeddings 48 "
    "--vocab-extra-ids 20 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --split 90,5,5 --num-workers 0 "
    f"--log-interval 1 --no-progress-bar --train-iters {STEPS}"
)


def pretrain_t5(world_size: int, data: str, flags: str) -> list[str]:
    return run_ranks(world_size, run_program, "pretrain_t5.py", f"{TINY} {data} {flags}".split())


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path = tmp_path_factory.mktemp("one") / "one.jsonl"
    flags = "--position-embedding-type relative --relative-attention-max-distance 40"
    pretrain_t5(1, data, f"{NO_DROPOUT} {flags} --eval-iters 2 --metrics-jsonl {path}")
    rows = train_rows(path)
    assert rows[-1]["lm loss"] < rows[0]["lm loss"] - 0.1
    return rows


def test_the_curve_is_the_committed_one(expected: list[dict]) -> None:
    compare_with_golden("t5", expected, NUMBERS)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_numbers_equal_one_process(layout: str, data: str, expected: list[dict], tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    path = tmp_path / "rows.jsonl"
    flags += " --position-embedding-type relative --relative-attention-max-distance 40"
    pretrain_t5(world_size, data, f"{NO_DROPOUT} --eval-iters 0 {flags} --metrics-jsonl {path}")
    rows = train_rows(path)
    assert len(rows) == STEPS
    for row, reference in zip(rows, expected):
        assert [row[name] for name in NUMBERS] == pytest.approx([reference[name] for name in NUMBERS], rel=1e-4)
        assert row["lm loss"] == pytest.approx(reference["lm loss"], rel=1e-5)


def test_resume_is_bit_exact_in_bf16(data: str, tmp_path: Path) -> None:
    whole, parts, save = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "save"
    common = "--bf16 --eval-iters 0"
    pretrain_t5(1, data, f"{common} --metrics-jsonl {whole}")
    halfway = f"{common} --save {save} --save-interval {STEPS // 2} --metrics-jsonl {parts}"
    pretrain_t5(1, data, f"{halfway} --exit-interval {STEPS // 2}")
    assert len(train_rows(parts)) == STEPS // 2
    pretrain_t5(1, data, f"{halfway} --load {save}")
    found = [[row[name] for name in NUMBERS] for row in train_rows(parts)]
    assert found == [[row[name] for name in NUMBERS] for row in train_rows(whole)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--tensor-model-parallel-size 2", ""),
        ("", "--encoder-pipeline-model-parallel-size 1 --use-distributed-optimizer"),
        ("--encoder-pipeline-model-parallel-size 1 --use-distributed-optimizer", "--tensor-model-parallel-size 2"),
    ],
    ids=["tp2-to-one", "one-to-pp1+1", "pp1+1-to-tp2"],
)
def test_a_checkpoint_fits_another_layout(
    before: str, after: str, data: str, expected: list[dict], tmp_path: Path
) -> None:
    path, save = tmp_path / "rows.jsonl", tmp_path / "save"
    common = f"{NO_DROPOUT} --position-embedding-type relative --relative-attention-max-distance 40 --eval-iters 0"
    common += f" --save {save} --save-interval {STEPS // 2} --metrics-jsonl {path}"
    for flags, more in ((before, f"--exit-interval {STEPS // 2}"), (after, f"--load {save}")):
        pretrain_t5(2 if flags else 1, data, f"{common} {flags} {more}")
    rows = train_rows(path)
    assert len(rows) == STEPS
    assert [row["lm loss"] for row in rows] == pytest.approx([row["lm loss"] for row in expected], rel=2e-5)
