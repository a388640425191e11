"""The training log line, character by character and as log parsers read it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from megatron.training.logging.log_line import IntervalTotals, LogLine

STAMP = r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "


def line(**changes: Any) -> str:
    fields = {
        "iteration": 100,
        "train_iters": 5000,
        "consumed_samples": 25600,
        "milliseconds": 1234.56,
        "learning_rate": 1.5e-4,
        "global_batch_size": 256,
        "losses": {"lm loss": 8.25},
        "loss_scale": 1.0,
        "skipped_iterations": 0,
        "nan_iterations": 0,
    }
    return str(LogLine(**{**fields, **changes}))


def assert_line(found: str, rest: str) -> None:
    assert re.fullmatch(STAMP + re.escape(rest), found), found


def test_shortest_line() -> None:
    assert_line(
        line(),
        "iteration      100/    5000 | consumed samples:        25600 | elapsed time per iteration (ms): 1234.6 | "
        "learning rate: 1.500000E-04 | global batch size:   256 | lm loss: 8.250000E+00 | loss scale: 1.0 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 |",
    )


def test_longest_line() -> None:
    found = line(
        skipped_samples=512,
        tflops=45.678,
        joules=246.912,
        decoupled_learning_rate=3e-3,
        losses={"lm loss": 8.25, "load_balancing_loss": 1.0625, "mtp_1 loss": 9.5},
        loss_scale=65536.0,
        grad_norm=1.23456,
        num_zeros=12,
        params_norm=987.65432,
        skipped_iterations=2,
        nan_iterations=1,
    )
    assert_line(
        found,
        "iteration      100/    5000 | consumed samples:        25600 | skipped samples:          512 | "
        "elapsed time per iteration (ms): 1234.6 | throughput per GPU (TFLOP/s/GPU): 45.7 | "
        "energy per GPU (J/iter/GPU): 246.9 | power per GPU (W/GPU): 200.0 | "
        "learning rate: 1.500000E-04 | decoupled learning rate: 3.000000E-03 | global batch size:   256 | "
        "lm loss: 8.250000E+00 | load_balancing_loss: 1.062500E+00 | mtp_1 loss: 9.500000E+00 | "
        "loss scale: 65536.0 | grad norm: 1.235 | num zeros: 12 | params norm: 987.654 | "
        "number of skipped iterations:   2 | number of nan iterations:   1 |",
    )


def parse(text: str) -> dict[str, float]:
    """What the log parsers of this field do: cut at bars, then at the last colon."""
    head, *fields = [field.strip() for field in text.strip().rstrip("|").split("|")]
    values = {key.strip(): float(value) for key, value in (field.rsplit(":", 1) for field in fields)}
    iteration, total = head.split("iteration")[1].split("/")
    return {**values, "iteration": int(iteration), "total": int(total)}


def test_values_can_be_read_back() -> None:
    assert parse(line(tflops=45.678, grad_norm=0.5, iteration=7)) == {
        "iteration": 7,
        "total": 5000,
        "consumed samples": 25600,
        "elapsed time per iteration (ms)": 1234.6,
        "throughput per GPU (TFLOP/s/GPU)": 45.7,
        "learning rate": 1.5e-4,
        "global batch size": 256,
        "lm loss": 8.25,
        "loss scale": 1.0,
        "grad norm": 0.5,
        "number of skipped iterations": 0,
        "number of nan iterations": 0,
    }


@pytest.mark.parametrize("average", [0.0, -1.0, math.nan])
def test_losses_that_are_not_positive_are_left_out(average: float) -> None:
    """None has been reported: every iteration of the interval was skipped."""
    assert "lm loss" not in parse(line(losses={"lm loss": average}))
    assert parse(line(losses={"lm loss": average, "z_loss": 2.0}))["z_loss"] == 2.0


def test_long_numbers_widen_their_field() -> None:
    found = line(iteration=123456789, consumed_samples=10**13, global_batch_size=1234567)
    assert "iteration 123456789/    5000 | consumed samples: 10000000000000 |" in found
    assert "global batch size: 1234567 |" in found


def test_averages_count_the_iterations_that_advanced() -> None:
    totals = IntervalTotals()
    totals.add({"lm loss": 4.0, "z_loss": 1.0}, was_skipped=False)
    totals.add({"lm loss": 100.0}, was_skipped=True)
    totals.add({"lm loss": 2.0}, was_skipped=False)
    assert totals.averages() == {"lm loss": 3.0, "z_loss": 0.5}
    assert (totals.advanced, totals.skipped, totals.nan, totals.iterations) == (2, 1, 0, 3)


def test_an_interval_in_which_nothing_advanced() -> None:
    totals = IntervalTotals()
    assert totals.averages() == {}
    for loss in (math.nan, math.inf, -math.inf, 3.0):
        totals.add({"lm loss": loss, "z_loss": 1.0}, was_skipped=True)
    assert totals.averages() == {}
    assert (totals.advanced, totals.skipped, totals.nan) == (0, 4, 3)
