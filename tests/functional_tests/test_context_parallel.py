"""pretrain_gpt.py with sequences cut over context parallel ranks: the losses of one process, on real documents.

Documents end anywhere, so that ranks and micro-batches have unlike many tokens that count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.program import TINY, metrics, pretrain_gpt, train_rows
from tests.functional_tests.test_documents import RESETS, documents

__all__ = ["documents"]  # the fixture: short documents, several to a sample

LLAMA = (
    "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --qk-layernorm "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
)
EVERY_WAY = "--cp-comm-type p2p a2a allgather a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MODELS = {
    "documents": f"{RESETS} --micro-batch-size 2",
    "per-token": f"{RESETS} --micro-batch-size 2 --calculate-per-token-loss {LLAMA}",
    "mask": f"{RESETS} --attention-backend unfused --apply-query-key-layer-scaling",
}
LAYOUTS = {
    "cp2": (2, "--context-parallel-size 2"),
    "cp4-every-way": (4, f"--context-parallel-size 4 {EVERY_WAY}"),
    "cp2-dp2-distopt-recompute": (
        4,
        "--context-parallel-size 2 --cp-comm-type a2a --use-distributed-optimizer --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    ),
    "tp2-sp-cp2-pp2": (
        8,
        "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--recompute-granularity selective --recompute-modules core_attn",
    ),
}


def rows(tmp_path: Path, data: str, world_size: int, flags: str) -> list[dict[str, Any]]:
    """Each training step and the evaluation at the end."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    words = [word for word in TINY if word != "--mock-data"]
    words += f"--data-path {data} --split 8,2,0 --train-iters 3 --eval-iters 1 --eval-interval 3".split()
    words += f"--attention-dropout 0 --hidden-dropout 0 --metrics-jsonl {path} {flags}".split()
    pretrain_gpt(world_size, words, tiny=False)
    return metrics(path)


FAST = [
    ("documents", "cp2"),
    ("documents", "cp4-every-way"),
    ("documents", "tp2-sp-cp2-pp2"),
    ("per-token", "cp2-dp2-distopt-recompute"),
    ("per-token", "cp4-every-way"),
    ("mask", "cp4-every-way"),
]
COMBINATIONS = [
    pytest.param(model, layout, marks=[] if (model, layout) in FAST else [pytest.mark.slow])
    for model in MODELS
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def one_process(documents: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The rows of a model on one process, each model run once."""
    return functools.cache(lambda model: rows(tmp_path_factory.mktemp("one"), documents, 1, MODELS[model]))


@pytest.mark.parametrize(("model", "layout"), COMBINATIONS)
def test_losses_equal_one_process(
    model: str, layout: str, one_process: Callable[[str], list[dict[str, Any]]], documents: str, tmp_path: Path
) -> None:
    flags, expected = MODELS[model], one_process(model)
    world_size, parallel = LAYOUTS[layout]
    found = rows(tmp_path, documents, world_size, f"{flags} {parallel}")
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    compared = 0
    for row, one in zip(found, expected):
        for name in ("lm loss", "lm loss validation", "grad-norm", "consumed_samples"):
            if name in one:
                assert row[name] == pytest.approx(one[name], rel=1e-5), (row["iteration"], name)
                compared += 1
    assert compared >= 3 * 3 + 1


def test_bf16_stays_near_fp32(documents: str, tmp_path: Path) -> None:
    """Both round the same products; only the sums over keys and tokens have another order."""
    flags = f"{RESETS} --bf16 {LLAMA}"
    one = [row["lm loss"] for row in rows(tmp_path, documents, 1, flags) if "lm loss" in row]
    for size, more in ((2, ""), (4, EVERY_WAY)):
        found = rows(tmp_path, documents, size, f"{flags} --context-parallel-size {size} {more}")
        losses = [row["lm loss"] for row in found if "lm loss" in row]
        assert losses == pytest.approx(one, rel=2**-9)  # half a unit of bf16


def test_steps_with_dropout_repeat(tmp_path: Path) -> None:
    """Dropout in attention draws the same numbers each time, whatever a rank computes first."""
    flags = f"--train-iters 3 --attention-dropout 0.2 --hidden-dropout 0.1 --context-parallel-size 4 {EVERY_WAY}"
    found = []
    for name in ("first", "again"):
        pretrain_gpt(4, f"{flags} --metrics-jsonl {tmp_path / name}")
        found.append([(row["lm loss"], row["grad-norm"]) for row in train_rows(tmp_path / name)])
    assert found[0] == found[1]
