"""A run that stops and resumes ends bitwise where the uninterrupted run ends, dropout on, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import pretrain_gpt, train_rows

HALF, FULL = 4, 8

FP8 = "--bf16 --fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max"

LAYOUTS = {
    "one": (1, ""),
    "one-fp16": (1, "--fp16 --initial-loss-scale 65536"),
    "one-bf16-sgd": (1, "--bf16 --optimizer sgd"),
    "one-fp8": (1, f"{FP8} --recompute-granularity selective --recompute-modules mlp"),
    "tp2-sp-dp2-fp8": (
        4,
        f"{FP8} --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --fp8-param-gather",
    ),
    "ep2-fp8": (
        2,
        f"{FP8} --num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
        "--moe-grouped-gemm --disable-bias-linear --use-distributed-optimizer --fp8-param-gather",
    ),
    "dp2-distopt-muon": (2, "--use-distributed-optimizer --bf16 --optimizer muon"),
    "tp2-sp-muon": (2, "--tensor-model-parallel-size 2 --sequence-parallel --swiglu --optimizer muon"),
    "pp2-recompute": (
        2,
        "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    "dp2-distopt-bf16": (2, "--use-distributed-optimizer --bf16"),
    "dp2-low-precision-state": (
        2,
        "--use-distributed-optimizer --bf16 --use-precision-aware-optimizer --main-grads-dtype bf16 "
        "--main-params-dtype fp16 --exp-avg-dtype fp8 --exp-avg-sq-dtype fp8 --optimizer-cpu-offload "
        "--optimizer-offload-fraction 0.5",
    ),
    "cp4-every-way": (
        4,
        "--context-parallel-size 4 --cp-comm-type p2p a2a all_gather a2a+p2p --hierarchical-context-parallel-sizes 2 2",
    ),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2-sp-dp2-distopt": (4, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
    "pp2-interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-zero-bubble-v-bf16": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule zb-v --bf16",
    ),
    "dp2-fully-sharded": (
        2,
        "--use-torch-fsdp2 --no-gradient-accumulation-fusion --untie-embeddings-and-output-weights",
    ),
    "dp4-two-instances-overlap": (
        4,
        "--use-distributed-optimizer --num-distributed-optimizer-instances 2 "
        "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4000",
    ),
    "tp2-sp-recompute-modules": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
        "--recompute-modules core_attn mlp layernorm",
    ),
}

SLOW = ("tp2-sp-dp2-fp8", "ep2-fp8", "tp2-sp-muon")

_TRACKED = ("iteration", "consumed_samples", "lm loss", "grad-norm", "learning-rate", "loss-scale", "params-norm")


def history(path: Path) -> list[tuple]:
    """The tracked numbers of each iteration, at full precision."""
    return [tuple(row.get(name) for name in _TRACKED) for row in train_rows(path)]


@pytest.mark.parametrize(
    ("layout", "ckpt_format"),
    [(layout, "torch_dist") for layout in LAYOUTS if layout not in ("tp2-pp2", *SLOW)]
    + [("tp2-pp2", "torch")]
    + [pytest.param(layout, "torch", marks=pytest.mark.slow) for layout in ("tp2-sp-dp2-distopt", "pp2-interleaved")]
    + [pytest.param(layout, "torch_dist", marks=pytest.mark.slow) for layout in SLOW]
    + [pytest.param(layout, "torch", marks=pytest.mark.slow) for layout in ("ep2-fp8", "tp2-sp-muon")],
)
def test_resume_is_bit_exact(layout: str, ckpt_format: str, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    flags = (
        f"--train-iters {FULL} --attention-dropout 0.1 --hidden-dropout 0.1 --lr-decay-style cosine "
        f"--log-params-norm --ckpt-format {ckpt_format} {parallel}"
    )
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    save = tmp_path / "save"
    pretrain_gpt(world_size, f"{flags} --save {save} --save-interval {HALF} --metrics-jsonl {whole}")
    load = f"--load {save} --ckpt-step {HALF}"  # what a run that stopped there would find
    printed = pretrain_gpt(world_size, f"{flags} {load} --metrics-jsonl {parts}")
    assert f"at iteration {HALF}" in printed[0]
    expected, found = history(whole), history(parts)
    assert len(expected) == FULL
    assert found == expected[HALF:]


def test_resume_from_what_was_written_in_the_background(tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS["dp2-distopt-bf16"]
    flags = f"--train-iters {FULL} --attention-dropout 0.1 --hidden-dropout 0.1 {parallel}"
    whole, parts, folder = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "save"
    pretrain_gpt(world_size, f"{flags} --metrics-jsonl {whole}")
    save = (
        f"--save {folder} --load {folder} --ckpt-format safetensors --save-interval 2 --save-keep-last 1 "
        "--log-progress --async-save --use-persistent-ckpt-worker --non-persistent-save-interval 3 "
        f"--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir {tmp_path / 'node'} --metrics-jsonl {parts}"
    )
    printed = pretrain_gpt(world_size, f"{flags} {save} --exit-interval {HALF}")
    assert "scheduled an async checkpoint save at iteration       2" in printed[0]
    assert "successfully saved checkpoint from iteration       4" in printed[0], "the exit waits for the last one"
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000004"]
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["iter_0000003"]
    assert "Saved async checkpoint\tIteration: 4" in (folder / "progress.txt").read_text()
    printed = pretrain_gpt(world_size, f"{flags} {save}")
    assert f"at iteration {HALF}" in printed[0]
    assert history(parts) == history(whole)


def test_resume_within_a_batch_size_ramp_up(tmp_path: Path) -> None:
    flags = "--train-samples 70 --rampup-batch-size 2 2 40 --lr-warmup-samples 10 --global-batch-size 8"
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    pretrain_gpt(2, f"{flags} --metrics-jsonl {whole}")
    save = f"--save {tmp_path / 'save'} --save-interval 100 --load {tmp_path / 'save'} --metrics-jsonl {parts}"
    pretrain_gpt(2, f"{flags} {save} --exit-interval 7")
    pretrain_gpt(2, f"{flags} {save}")
    expected = history(whole)
    assert [row[1] for row in expected][:4] == [2, 4, 6, 8]
    assert len({after[1] - before[1] for before, after in zip(expected, expected[1:])}) >= 3  # it does grow
    assert history(parts) == expected


FAMILIES = {
    "fully sharded": (2, "--use-torch-fsdp2 --no-gradient-accumulation-fusion"),
    "tensor, sequence, sharded": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "context, overlapped": (
        4,
        "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--ddp-bucket-size 4000",
    ),
    "zero bubble, folded": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule zb-v",
    ),
    "tensor, recomputed": (
        4,
        "--tensor-model-parallel-size 4 --recompute-granularity full --recompute-method block --recompute-num-layers 2",
    ),
}


def test_resume_into_other_layouts_continues_the_curve(tmp_path: Path) -> None:
    """Each family stops after three iterations and the next one goes on: one curve, that of one process."""
    each = 3
    flags = (
        f"--train-iters {each * len(FAMILIES)} --attention-dropout 0 --hidden-dropout 0 --lr-decay-style cosine "
        "--untie-embeddings-and-output-weights"
    )
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    pretrain_gpt(1, f"{flags} --metrics-jsonl {whole}")
    save = f"--save {tmp_path / 'save'} --save-interval {each} --metrics-jsonl {parts}"
    for number, (world_size, parallel) in enumerate(FAMILIES.values(), start=1):
        stop = f"--exit-interval {each * number}"
        pretrain_gpt(world_size, f"{flags} {save} --load {tmp_path / 'save'} {stop} {parallel}")
    for row, one in zip(train_rows(parts), train_rows(whole), strict=True):
        assert row["iteration"] == one["iteration"]
        assert row["lm loss"] == pytest.approx(one["lm loss"], rel=1e-5)
        assert row["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-4)
