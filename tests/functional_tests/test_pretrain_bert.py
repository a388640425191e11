"""pretrain_bert.py on real sentences: it learns, alike in every layout, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.golden_curves import compare_with_golden
from tests.functional_tests.program import run_program, train_rows
from tests.functional_tests.sentences import write_sentences
from tests.worker_pool import run_ranks

STEPS = 12
LAYOUTS = {
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-dp2-distopt": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
}
"""On real data; `equivalence/encoders.py` has all of them on made-up samples."""
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 "
    "--micro-batch-size 2 --lr 3e-3"
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
NUMBERS = ("lm loss", "sop loss", "grad-norm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sentences")
    found = write_sentences(directory)
    return f"--data-path {found['data']} --vocab-file {found['vocab']} --data-cache-path {directory / 'cache'}"


def pretrain_bert(world_size: int, data: str, flags: str) -> list[str]:
    run = (
        "--global-batch-size 8 --split 90,5,5 --num-workers 0 --log-interval 1 --no-progress-bar "
        f"--train-iters {STEPS} {data} {flags}"
    )
    return run_ranks(world_size, run_program, "pretrain_bert.py", f"{TINY} {run}".split())


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path = tmp_path_factory.mktemp("one") / "one.jsonl"
    pretrain_bert(1, data, f"{NO_DROPOUT} --eval-iters 2 --metrics-jsonl {path}")
    rows = train_rows(path)
    assert rows[-1]["lm loss"] < rows[0]["lm loss"] - 0.1
    return rows


def test_the_curve_is_the_committed_one(expected: list[dict]) -> None:
    compare_with_golden("bert", expected, NUMBERS)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_numbers_equal_one_process(layout: str, data: str, expected: list[dict], tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    path = tmp_path / "rows.jsonl"
    pretrain_bert(world_size, data, f"{NO_DROPOUT} --eval-iters 0 {flags} --metrics-jsonl {path}")
    rows = train_rows(path)
    assert len(rows) == STEPS
    for row, reference in zip(rows, expected):
        assert [row[name] for name in NUMBERS] == pytest.approx([reference[name] for name in NUMBERS], rel=1e-4)
        assert row["lm loss"] == pytest.approx(reference["lm loss"], rel=1e-5)


def test_resume_is_bit_exact_without_a_binary_head(data: str, tmp_path: Path) -> None:
    whole, parts, save = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "save"
    common = "--bert-no-binary-head --bf16 --cross-entropy-loss-fusion --eval-iters 0"
    pretrain_bert(1, data, f"{common} --metrics-jsonl {whole}")
    halfway = f"{common} --save {save} --save-interval {STEPS // 2} --metrics-jsonl {parts}"
    pretrain_bert(1, data, f"{halfway} --exit-interval {STEPS // 2}")
    assert len(train_rows(parts)) == STEPS // 2
    pretrain_bert(1, data, f"{halfway} --load {save}")
    found = [[row[name] for name in ("lm loss", "grad-norm")] for row in train_rows(parts)]
    assert found == [[row[name] for name in ("lm loss", "grad-norm")] for row in train_rows(whole)]


def test_a_checkpoint_fits_another_layout(data: str, expected: list[dict], tmp_path: Path) -> None:
    path, save = tmp_path / "rows.jsonl", tmp_path / "save"
    common = f"{NO_DROPOUT} --eval-iters 0 --save {save} --save-interval {STEPS // 2} --metrics-jsonl {path}"
    pretrain_bert(2, data, f"{common} --tensor-model-parallel-size 2 --exit-interval {STEPS // 2}")
    after = "--pipeline-model-parallel-size 2 --use-distributed-optimizer"
    pretrain_bert(2, data, f"{common} {after} --load {save}")
    rows = train_rows(path)
    assert [row["lm loss"] for row in rows] == pytest.approx([row["lm loss"] for row in expected], rel=2e-5)


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("pretrain_gpt.py", "--mask-prob 0.2", "only pretrain_bert.py and pretrain_t5.py reads it"),
        ("pretrain_bert.py", "--context-parallel-size 2", "does not split sequences"),
        ("pretrain_bert.py", "--reset-position-ids", "no meaning for pretrain_bert.py"),
    ],
)
def test_flags_of_another_family_are_refused(program: str, flags: str, message: str) -> None:
    words = f"{TINY} --train-iters 1 --tokenizer-type NullTokenizer --vocab-size 60 {flags}"
    with pytest.raises(Exception, match=message):
        run_ranks(1, run_program, program, words.split())
