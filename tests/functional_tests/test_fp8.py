"""Training in fp8 runs in every layout, and layouts stay as close as roundings to fp8 let them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

COMMON = "--train-iters 6 --lr 3e-3 --attention-dropout 0 --hidden-dropout 0 --bf16"
EXPERTS = "--num-experts 4 --disable-bias-linear --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0"
DELAYED, TENSOR, BLOCKS = (f"--fp8-format hybrid --fp8-recipe {name}" for name in ("delayed", "tensorwise", "mxfp8"))
SLOW = pytest.mark.slow
LAYOUTS = [
    (2, DELAYED, "", "--tensor-model-parallel-size 2 --sequence-parallel"),
    pytest.param(2, TENSOR, "", "--context-parallel-size 2", marks=SLOW),
    pytest.param(2, DELAYED, "", "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1", marks=SLOW),
    pytest.param(4, TENSOR, "", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", marks=SLOW),
    pytest.param(2, BLOCKS, "", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", marks=SLOW),
    pytest.param(
        2,
        DELAYED,
        "--untie-embeddings-and-output-weights",
        "--use-torch-fsdp2 --no-gradient-accumulation-fusion",
        marks=SLOW,
    ),
    pytest.param(2, DELAYED, EXPERTS, "--expert-model-parallel-size 2 --moe-grouped-gemm", marks=SLOW),
    pytest.param(4, TENSOR, EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "recipe", "model", "layout"), LAYOUTS)
def test_layouts_train_alike(ranks: int, recipe: str, model: str, layout: str, tmp_path: Path) -> None:
    losses = []
    for name, number, flags in (("one", 1, recipe), ("layout", ranks, f"{recipe} {layout}"), ("bf16", 1, "")):
        metrics = tmp_path / f"{name}.jsonl"
        pretrain_gpt(number, f"{COMMON} {model} {flags} --metrics-jsonl {metrics}")
        losses.append([row["lm loss"] for row in train_rows(metrics)])
    one, other, bf16 = losses
    assert one != bf16, "nothing was rounded to fp8"
    assert other == pytest.approx(one, rel=5e-3)
    assert one == pytest.approx(bf16, rel=5e-3)
