"""Experts made of a dense checkpoint: the first loss is the dense model's, in every layout, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows
from tests.worker_pool import RankFailure

DENSE = "--disable-bias-linear --swiglu --hidden-dropout 0 --attention-dropout 0 --ffn-hidden-size 48 --seed 3"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-router-dtype fp64 --moe-use-upcycling"
HOW = {
    "whole": ("", 1),
    "every second layer, on ranks": ("--moe-layer-freq 2 --expert-model-parallel-size 2 --moe-grouped-gemm", 2),
    "shards": ("--moe-upcycling-granularity 2 --moe-router-topk-scaling-factor 2.5", 1),
    "shards by sigmoid": (
        "--moe-upcycling-granularity 2 --num-experts 8 --moe-router-topk 4 --moe-router-score-function sigmoid"
        " --moe-router-enable-expert-bias --tensor-model-parallel-size 2 --sequence-parallel",
        2,
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder of a dense model after two steps, its third loss)."""
    folder = tmp_path_factory.mktemp("dense")
    path = folder / "rows.jsonl"
    save = f"--save {folder} --save-interval 2 --metrics-jsonl {path} --use-distributed-optimizer"
    pretrain_gpt(1, f"{DENSE} --train-iters 2 {save}")
    pretrain_gpt(1, f"{DENSE} --train-iters 1 --load {folder} --finetune --metrics-jsonl {path}")
    return folder, train_rows(path)[-1]["lm loss"]


@pytest.mark.parametrize("how", HOW)
def test_the_first_loss_is_that_of_the_dense_model(how: str, dense: Any, tmp_path: Path) -> None:
    """Then training goes on, and what was saved at once is what training began with."""
    flags, ranks = HOW[how]
    folder, loss = dense
    path, saved = tmp_path / "rows.jsonl", tmp_path / "experts"
    words = f"{DENSE} {EXPERTS} {flags} --metrics-jsonl {path}"
    begin = f"{words} --load {folder} --save {saved} --save-interval 9 --train-iters 3"
    pretrain_gpt(ranks, begin)
    rows = train_rows(path)
    assert rows[0]["lm loss"] == pytest.approx(loss, rel=2e-6)
    assert [row["iteration"] for row in rows] == [2, 3] and rows[1]["lm loss"] != rows[0]["lm loss"]
    if how != "shards":
        return
    words = words.replace("--moe-use-upcycling", "").replace(
        "--moe-upcycling-granularity 2", "--moe-ffn-hidden-size 24"
    )
    pretrain_gpt(1, f"{words} --load {saved} --ckpt-step 1 --finetune --train-iters 1")
    assert train_rows(path)[-1]["lm loss"] == rows[0]["lm loss"]
    with pytest.raises(RankFailure, match="has checkpoints already"):
        pretrain_gpt(ranks, begin)
