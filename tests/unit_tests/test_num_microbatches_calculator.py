"""Batch sizes over a run, against a plain reading of the rule for every number of consumed samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from megatron.core import num_microbatches_calculator as calculator
from megatron.core.num_microbatches_calculator import (
    ConstantNumMicroBatchesCalculator,
    NumMicroBatchesCalculator,
    RampupBatchsizeNumMicroBatchesCalculator,
    build_num_microbatches_calculator,
)


@pytest.fixture(autouse=True)
def no_calculator() -> Iterator[None]:
    calculator.destroy_num_microbatches_calculator()
    yield
    calculator.destroy_num_microbatches_calculator()


def build(rampup: list[int] | None = None, **changes: int) -> NumMicroBatchesCalculator:
    sizes = {"global_batch_size": 24, "micro_batch_size": 2, "data_parallel_size": 3, **changes}
    return build_num_microbatches_calculator(0, rampup, **sizes)


def test_constant_batches() -> None:
    batches = build()
    assert isinstance(batches, ConstantNumMicroBatchesCalculator)
    for consumed in (0, 1, 10**9):
        batches.update(consumed, consistency_check=True)
        assert batches.get() == 4
        assert batches.get_current_global_batch_size() == 24
        assert batches.get_current_running_global_batch_size() == 24
        assert batches.get_micro_batch_size() == 2


@pytest.mark.parametrize(("wanted", "run"), [(24, 24), (29, 24), (30, 30), (6, 6), (11, 6)])
def test_batches_may_be_decreased_to_what_fits(wanted: int, run: int) -> None:
    batches = build(global_batch_size=wanted, decrease_batch_size_if_needed=True)
    assert batches.get() == run // 6
    assert batches.get_current_global_batch_size() == wanted
    assert batches.get_current_running_global_batch_size() == run


def ramped(start: int, increment: int, samples: int, full: int, consumed: int) -> int:
    """Batch size after `consumed` samples, from the rule."""
    num_increments = (full - start) / increment
    samples_per_increment = samples / num_increments
    if consumed > samples:
        return full
    return start + int(consumed / samples_per_increment) * increment


@pytest.mark.parametrize(
    ("start", "increment", "samples", "full"),
    [(6, 6, 100, 24), (12, 12, 60, 24), (6, 6, 7, 36), (18, 6, 1000, 24), (6, 6, 1, 24)],
)
def test_ramp_up_follows_the_rule(start: int, increment: int, samples: int, full: int) -> None:
    batches = build([start, increment, samples], global_batch_size=full)
    assert isinstance(batches, RampupBatchsizeNumMicroBatchesCalculator)
    assert batches.get_current_global_batch_size() == start
    sizes = []
    for consumed in range(samples + 20):
        batches.update(consumed, consistency_check=True)
        expected = ramped(start, increment, samples, full, consumed)
        assert batches.get_current_global_batch_size() == expected
        assert batches.get_current_running_global_batch_size() == expected
        assert batches.get() * 2 * 3 == expected
        sizes.append(expected)
    assert sizes == sorted(sizes)
    assert sizes[-1] == full


def test_ramp_up_of_a_run() -> None:
    """Batches of 8, 16, 24, 32, each for a third of 96 samples, then 32."""
    batches = build([8, 8, 96], global_batch_size=32, micro_batch_size=4, data_parallel_size=2)
    consumed, sizes = 0, []
    while consumed < 250:
        batches.update(consumed, consistency_check=True)
        sizes.append(batches.get_current_running_global_batch_size())
        consumed += sizes[-1]
    assert sizes == [8] * 4 + [16] * 2 + [24] * 2 + [32] * 5


def test_a_smaller_consumed_count_goes_back() -> None:
    """A run that resumes from an older checkpoint."""
    batches = build([6, 6, 100])
    batches.update(1000, consistency_check=True)
    assert batches.get() == 4
    batches.update(0, consistency_check=True)
    assert batches.get() == 1


def test_a_ramp_without_steps_is_constant() -> None:
    for samples in (0, 100):
        batches = build([24, 6, samples])
        for consumed in (0, 50, 101):
            batches.update(consumed, consistency_check=True)
            assert batches.get() == 4
    batches = build([6, 6, 0])
    batches.update(1, consistency_check=True)
    assert batches.get_current_global_batch_size() == 24


def test_ramp_up_may_pass_sizes_that_do_not_fit() -> None:
    batches = build([6, 1, 18])
    batches.update(1, consistency_check=False)
    assert batches.get_current_global_batch_size() == 7
    assert batches.get() == 1
    with pytest.raises(ValueError, match=r"global batch size \(7\) is not a multiple of .* = 6"):
        batches.update(1, consistency_check=True)
    batches = build([6, 1, 18], decrease_batch_size_if_needed=True)
    for consumed, wanted, run in ((0, 6, 6), (5, 11, 6), (6, 12, 12), (17, 23, 18), (19, 24, 24)):
        batches.update(consumed, consistency_check=True)
        assert batches.get_current_global_batch_size() == wanted
        assert batches.get_current_running_global_batch_size() == run
        assert batches.get() * 6 == run


@pytest.mark.parametrize(
    ("rampup", "changes", "message"),
    [
        (
            None,
            {"global_batch_size": 25},
            r"\(25\) is not a multiple of micro batch size \(2\) × data parallel size \(3\) = 6; nearest "
            r"multiples: 24 and 30 \(or pass --decrease-batch-size-if-needed\)",
        ),
        (None, {"global_batch_size": 5, "decrease_batch_size_if_needed": True}, r"\(5\) .* multiples: 0 and 6$"),
        ([6, 6], {}, r"rampup_batch_size is \[start, increment, samples\], not \[6, 6\]"),
        ([6, 4, 100], {}, r"\(24\) must be the start \(6\) plus a multiple of the increment \(4\)"),
        ([30, 6, 100], {}, r"\(24\) must be the start \(30\)"),
        ([6, 0, 100], {}, r"start > 0, increment > 0 and samples >= 0, not 6, 0, 100"),
        ([0, 6, 100], {}, r"not 0, 6, 100"),
        ([6, 6, -1], {}, r"not 6, 6, -1"),
    ],
)
def test_sizes_that_cannot_be_reached_are_refused(
    rampup: list[int] | None, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(rampup, **changes)


def test_the_calculator_of_the_process(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match=r"init_num_microbatches_calculator\(...\) first"):
        calculator.get_num_microbatches()
    calculator.init_num_microbatches_calculator(0, [6, 6, 100], 24, 2, 3)
    with pytest.raises(RuntimeError, match="use reconfigure_num_microbatches_calculator"):
        calculator.init_num_microbatches_calculator(0, None, 24, 2, 3)
    with caplog.at_level(logging.INFO):
        calculator.update_num_microbatches(40, verbose=True)
        calculator.update_num_microbatches(41, verbose=True)
    assert caplog.messages == ["ramping up batch size from 6 to 12"]
    assert calculator.get_num_microbatches() == 2
    assert calculator.get_current_global_batch_size() == 12
    assert calculator.get_current_running_global_batch_size() == 12
    assert calculator.get_micro_batch_size() == 2
    calculator.reconfigure_num_microbatches_calculator(0, None, 20, 4, 1, False)
    assert calculator.get_num_microbatches() == 5
    calculator.unset_num_microbatches_calculator()
    with pytest.raises(RuntimeError, match="first"):
        calculator.update_num_microbatches(0)
