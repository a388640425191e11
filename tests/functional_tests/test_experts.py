"""Mixtures of experts through the program: every layout, kind of experts and dispatcher gives one process's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

MODEL = """--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0 --moe-aux-loss-coeff 0.05 --moe-z-loss-coeff 0.01 --train-iters 4 --seed 3
    --use-distributed-optimizer"""
LAYOUTS = {
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall": 2,
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    " --moe-token-dispatcher-type alltoall --moe-grouped-gemm": 2,
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --moe-layer-recompute": 4,
    "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --expert-model-parallel-size 2"
    " --moe-token-dispatcher-type allgather --moe-grouped-gemm": 4,
}


def rows(path: Path) -> list[tuple[float, ...]]:
    return [
        tuple(row[n] for n in ("lm loss", "load_balancing_loss", "z_loss", "grad-norm")) for row in train_rows(path)
    ]


def assert_same(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_layouts_and_checkpoints_of_experts(tmp_path: Path) -> None:
    """Each layout computes what one process does, and goes on where another one stopped, optimizer included."""
    alone = tmp_path / "alone.jsonl"
    pretrain_gpt(1, f"{MODEL} --metrics-jsonl {alone}")
    expected = rows(alone)
    saved = tmp_path / "checkpoints"
    for i, (layout, ranks) in enumerate(LAYOUTS.items()):
        path = tmp_path / f"{i}.jsonl"
        if i == 0:
            save = f"--save {saved} --save-interval 2 --exit-interval 2"
            pretrain_gpt(ranks, f"{MODEL} {layout} --metrics-jsonl {path} {save}")
            assert_same(rows(path), expected[:2])
        else:
            pretrain_gpt(ranks, f"{MODEL} {layout} --metrics-jsonl {path} --load {saved}")
            assert_same(rows(path), expected[2:])
