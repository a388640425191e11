"""Every form of data parallelism trains as the plain one does, through the program: to the bit where sums are made in
the same order, and resumed to the bit in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.program import metrics, pretrain_gpt, train_rows

STEPS, HALF = 6, 3

SHARDED = "--use-distributed-optimizer"
BUCKETS = "--overlap-grad-reduce --ddp-bucket-size 3000"
OVERLAPPED = f"{SHARDED} {BUCKETS} --overlap-param-gather"

PLAIN = {"fp32": "", "bf16": "--bf16", "per-token": "--calculate-per-token-loss"}
"""What is compared with: two replicas without any option."""

OPTIONS: dict[str, tuple[str, int, str]] = {
    # name: (the plain run it equals, ranks, flags)
    "reduce-early": ("fp32", 2, BUCKETS),
    "reduce-early-sharded": ("fp32", 2, f"{SHARDED} {BUCKETS}"),
    "gather-late": ("fp32", 2, OVERLAPPED),
    "gather-late-tied-pp2": ("fp32", 4, f"{OVERLAPPED} --pipeline-model-parallel-size 2"),
    "gather-late-tp2-sp-unaligned": (
        "fp32",
        4,
        f"{OVERLAPPED} --tensor-model-parallel-size 2 --sequence-parallel --no-align-grad-reduce",
    ),
    "gather-late-recompute": (
        "fp32",
        2,
        f"{OVERLAPPED} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "bucket-count": ("fp32", 2, f"{SHARDED} --overlap-grad-reduce --ddp-num-buckets 5"),
    "padded-buckets-averaged": (
        "fp32",
        2,
        f"{OVERLAPPED} --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective",
    ),
    "gather-late-zero-bubble": (
        "fp32",
        4,
        f"{OVERLAPPED} --pipeline-model-parallel-size 2 --pipeline-schedule zb-h1 --no-align-grad-reduce",
    ),
    "gather-late-chunks": (
        "fp32",
        4,
        f"{OVERLAPPED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "gather-while-updating": (
        "fp32",
        4,
        f"{OVERLAPPED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--overlap-param-gather-with-optimizer-step --ckpt-format torch",
    ),
    "bf16-gather-late": ("bf16", 2, OVERLAPPED),
    "per-token-gather-late": ("per-token", 2, OVERLAPPED),
    "precision-aware-half-on-host": (
        "fp32",
        2,
        f"{OVERLAPPED} --use-precision-aware-optimizer --optimizer-cpu-offload --optimizer-offload-fraction 0.5 "
        "--overlap-cpu-optimizer-d2h-h2d",
    ),
    "instances": ("fp32", 4, f"{OVERLAPPED} --num-distributed-optimizer-instances 2"),
}


def run(tmp_path: Path, name: str, ranks: int, flags: str, *, clip: float = 0.0) -> list[dict[str, Any]]:
    """Rows of a run that also evaluates, at full precision."""
    path = tmp_path / f"{name}.jsonl"
    common = (
        f"--train-iters {STEPS} --attention-dropout 0 --hidden-dropout 0 --clip-grad {clip} --log-params-norm "
        "--log-num-zeros-in-grad --eval-interval 2 --eval-iters 1"
    )
    pretrain_gpt(ranks, f"{common} {flags} --metrics-jsonl {path}")
    return metrics(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: run(folder, name, 2, flags) for name, flags in PLAIN.items()}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_option_equals_plain_data_parallelism(name: str, plain: dict[str, list], tmp_path: Path) -> None:
    which, ranks, flags = OPTIONS[name]
    rows = run(tmp_path, name, ranks, f"{PLAIN[which]} {flags}")
    assert len(rows) == len(plain[which])
    for row, expected in zip(rows, plain[which]):
        for number in ("lm loss", "lm loss validation", "params-norm", "grad-norm"):
            if number in expected:
                exact = ranks == 2 and number.startswith("lm loss")
                assert row[number] == pytest.approx(expected[number], rel=0 if exact else 1e-6, abs=0), number
        # A few sums cancel to zero in one order only; a row of padding too many or too few would be 32 zeros.
        assert row.get("num-zeros", 0) == pytest.approx(expected.get("num-zeros", 0), abs=15)


RESUMED = {
    "gather-late": (2, OVERLAPPED, "torch_dist"),
    "gather-late-bf16-torch": (2, f"{OVERLAPPED} --bf16", "torch"),
    "gather-late-pp2": (4, f"{OVERLAPPED} --pipeline-model-parallel-size 2", "torch_dist"),
    "instances": (4, f"{OVERLAPPED} --num-distributed-optimizer-instances 2", "torch"),
    "gather-while-updating": (
        4,
        f"{OVERLAPPED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--overlap-param-gather-with-optimizer-step",
        "torch",
    ),
    "reduce-early-bf16-grads": (2, f"{BUCKETS} --bf16 --grad-reduce-in-bf16", "torch_dist"),
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    ranks, parallel, ckpt_format = RESUMED[name]
    flags = f"--train-iters {2 * HALF} --log-params-norm --ckpt-format {ckpt_format} {parallel}"
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    pretrain_gpt(ranks, f"{flags} --metrics-jsonl {whole}")
    save = f"--save {tmp_path / 'save'} --save-interval {HALF} --metrics-jsonl {parts}"
    pretrain_gpt(ranks, f"{flags} {save} --exit-interval {HALF}")
    pretrain_gpt(ranks, f"{flags} {save} --load {tmp_path / 'save'}")
    numbers = ("iteration", "lm loss", "grad-norm", "params-norm")
    found, expected = ([[row[n] for n in numbers] for row in train_rows(path)] for path in (parts, whole))
    assert len(expected) == 2 * HALF
    assert found == expected
