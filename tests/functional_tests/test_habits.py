"""What a run does besides training: stopping, skipping, evaluating, profiling, refusing bad numbers."""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_ranks import run_to_the_end
from tests.functional_tests.program import ROOT, TINY, metrics, pretrain_gpt, train_rows
from tests.worker_pool import RankFailure

LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| "
    r"learning rate: (\d\.\d{6}E[+-]\d\d) \| global batch size: +(\d+) \| lm loss: (\d\.\d{6}E[+-]\d\d) \| "
    r"loss scale: ([\d.]+) \| grad norm: [\d.]+ \| num zeros: \d+ \| params norm: [\d.]+ \| "
    r"number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|$",
    re.MULTILINE,
)


def test_log_line_and_timers_on_the_last_rank() -> None:
    printed = pretrain_gpt(
        2,
        "--train-iters 2 --log-throughput --log-num-zeros-in-grad --log-params-norm --timing-log-level 2 "
        "--tensor-model-parallel-size 2",
    )
    lines = LINE.findall(printed[1])
    assert [line[0] for line in lines] == ["1", "2"]
    assert [line[2] for line in lines] == ["4", "8"]
    assert not LINE.search(printed[0])
    assert "(min, max) time across ranks (ms):" in printed[1]
    for timer in ("forward-backward", "forward-compute", "backward-compute", "batch-generator", "optimizer"):
        assert re.search(rf"^    {timer} \.+: \([\d.]+, [\d.]+\)$", printed[1], re.MULTILINE), timer
    assert "Theoretical memory footprints: weight and optimizer=" in printed[0]


def test_evaluation_reports_validation_and_test_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (printed,) = pretrain_gpt(1, f"--train-iters 4 --eval-iters 2 --eval-interval 2 --metrics-jsonl {path}")
    for place in ("iteration 2", "iteration 4", "iteration 4 on validation set", "iteration 4 on test set"):
        assert re.search(rf"^ validation loss at {place} \| lm loss value: \S+ \| lm loss PPL: \S+ \| $", printed, re.M)
    assert len([row for row in metrics(path) if "lm loss validation" in row]) == 3


def test_skip_train_only_evaluates(tmp_path: Path) -> None:
    pretrain_gpt(1, f"--train-iters 4 --save {tmp_path} --save-interval 4")
    (printed,) = pretrain_gpt(1, f"--train-iters 4 --load {tmp_path} --skip-train --eval-iters 1")
    assert "skipping training" in printed
    assert "validation loss at iteration 4 on test set" in printed
    assert not re.search(r"^ \[.*\] iteration", printed, re.MULTILINE)


def test_skipped_iterations_consume_data_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (printed,) = pretrain_gpt(1, f"--train-iters 4 --iterations-to-skip 2 3 --metrics-jsonl {path}")
    assert [(row["iteration"], row["consumed_samples"]) for row in train_rows(path)] == [(1, 4), (4, 16)]
    assert "skipped samples:            8" in printed


def test_finetune_starts_counting_anew(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    pretrain_gpt(1, f"--train-iters 6 --save {base} --save-interval 6")
    path = tmp_path / "metrics.jsonl"
    pretrain_gpt(2, f"--train-iters 2 --load {base} --finetune --save {tuned} --save-interval 2 --metrics-jsonl {path}")
    rows = train_rows(path)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert rows[0]["lm loss"] < 4.0  # from scratch it starts at ln 61 = 4.1


def test_exit_after_minutes_saves(tmp_path: Path) -> None:
    flags = f"--train-iters 100000 --lr-decay-iters 10 --exit-duration-in-mins 0 --save {tmp_path} --save-interval 1000"
    with pytest.raises(RankFailure, match="exit.duration.in.mins"):
        pretrain_gpt(1, flags)
    (printed,) = pretrain_gpt(1, "--train-iters 1")  # the pool is usable again
    assert "iteration        1/" in printed


def test_deterministic_mode_repeats_bitwise(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for path in (first, second):
        pretrain_gpt(2, f"--train-iters 5 --deterministic-mode --bf16 --metrics-jsonl {path}")
    assert [row["lm loss"] for row in train_rows(first)] == [row["lm loss"] for row in train_rows(second)]


def test_replicas_are_compared_and_garbage_is_collected() -> None:
    printed = pretrain_gpt(
        2,
        "--train-iters 2 --check-weight-hash-across-dp-replicas-interval 1 --manual-gc --manual-gc-interval 1 "
        "--train-sync-interval 1",
    )
    assert printed[0].count(">>> Weight hashes match after") == 2


def test_profile_writes_a_trace(tmp_path: Path) -> None:
    pretrain_gpt(
        1,
        f"--train-iters 4 --profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2 "
        f"--tensorboard-dir {tmp_path}",
    )
    assert list(tmp_path.glob("*.pt.trace.json*"))


def test_fp16_skips_overflowing_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    flags = f"--train-iters 6 --fp16 --initial-loss-scale 1e30 --hysteresis 1 --metrics-jsonl {path}"
    (printed,) = pretrain_gpt(1, flags)
    rows = train_rows(path)
    assert rows[0]["skipped"]
    assert rows[1]["loss-scale"] < rows[0]["loss-scale"] * 1.5
    assert "number of skipped iterations:   1" in printed


def test_a_loss_that_is_not_finite_names_its_origin() -> None:
    with pytest.raises(RankFailure, match=r"loss of iteration \d+ is (nan|inf).*|first bad|not finite"):
        pretrain_gpt(1, "--train-iters 20 --lr 1e30 --clip-grad 0")


def train_and_be_terminated(flags: str) -> None:
    """pretrain_gpt.py, of which rank 1 gets a SIGTERM in its third step."""
    from megatron.training import training

    original, steps = training.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    training.train_step = train_step
    sys.argv = ["pretrain_gpt.py", *TINY, *flags.split()]
    runpy.run_path(str(ROOT / "pretrain_gpt.py"), run_name="__main__")


def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    save, metrics_file = tmp_path / "save", tmp_path / "metrics.jsonl"
    flags = (
        f"--train-iters 100000 --lr-decay-iters 10 --exit-signal-handler --save {save} --save-interval 100000 "
        f"--metrics-jsonl {metrics_file}"
    )
    ends = run_to_the_end(tmp_path, 2, train_and_be_terminated, flags)
    assert [end.code for end in ends] == [0, 0], ends
    assert any("exiting program after receiving SIGTERM." in end.said for end in ends)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert [row["iteration"] for row in train_rows(metrics_file)] == [1, 2, 3]
