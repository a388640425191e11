"""`--optimizer muon` trains alike in every layout: matrices are cut over tensor and data parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

COMMON = (
    "--train-iters 6 --optimizer muon --swiglu --lr 1e-2 --attention-dropout 0 --hidden-dropout 0 --log-params-norm"
)
EXPERTS = (
    "--num-experts 4 --disable-bias-linear --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0 "
    "--moe-router-topk 2"
)
SHARDED = "--use-distributed-optimizer"
SLOW = pytest.mark.slow
LAYOUTS = [
    (2, "", "--tensor-model-parallel-size 2 --sequence-parallel"),
    pytest.param(4, "", f"--tensor-model-parallel-size 2 --sequence-parallel {SHARDED}", marks=SLOW),
    pytest.param(2, "", f"{SHARDED} --overlap-grad-reduce --overlap-param-gather", marks=SLOW),
    pytest.param(2, "", "--pipeline-model-parallel-size 2", marks=SLOW),
    pytest.param(2, EXPERTS, f"--expert-model-parallel-size 2 --moe-grouped-gemm {SHARDED}", marks=SLOW),
    pytest.param(2, EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel --moe-grouped-gemm", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "model", "layout"), LAYOUTS)
def test_all_layouts_train_alike(ranks: int, model: str, layout: str, tmp_path: Path) -> None:
    found = []
    for number, flags in ((1, ""), (ranks, layout)):
        metrics = tmp_path / f"{number}.jsonl"
        pretrain_gpt(number, f"{COMMON} {model} {flags} --metrics-jsonl {metrics}")
        found.append([(row["lm loss"], row["grad-norm"], row["params-norm"]) for row in train_rows(metrics)])
    assert len(found[0]) == 6
    for one, other in zip(*found):
        assert other == pytest.approx(one, rel=2e-4)
