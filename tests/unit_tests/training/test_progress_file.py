"""progress.txt: its lines, and the throughput over all jobs that continue one another."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from megatron.training.logging import progress_file
from megatron.training.logging.progress_file import append_saved, append_start
from megatron.training.train_state import TrainState

BEGIN = datetime.datetime(2025, 3, 4, 5, 6, 7)


class Clock:
    """Wall-clock time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime.datetime:
        return BEGIN + datetime.timedelta(seconds=self.seconds)

    def time(self) -> float:
        return self.now().timestamp()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    frozen = type("datetime", (datetime.datetime,), {"now": staticmethod(clock.now)})
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with (
        mock.patch.object(progress_file, "datetime", SimpleNamespace(datetime=frozen)),
        mock.patch.object(progress_file, "time", clock),
    ):
        yield clock


def arguments(folder: Path, world_size: int = 4) -> SimpleNamespace:
    return SimpleNamespace(save=str(folder), world_size=world_size, seq_length=1000)


def saved(args: SimpleNamespace, clock: Clock, *, flops: float, flops_at_start: float, started: float) -> None:
    """A checkpoint of iteration 50 of a job that started at second `started`."""
    state = TrainState(iteration=50, consumed_train_samples=123456, num_floating_point_operations_so_far=flops)
    begin = (BEGIN + datetime.timedelta(seconds=started)).timestamp()
    run = SimpleNamespace(args=args, state=state, flops_at_start=flops_at_start, started=begin)
    append_saved(run, "Saved checkpoint")


def fields(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "progress.txt").read_text().splitlines()]


def test_lines_of_a_first_job(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    args = arguments(tmp_path / "new" / "folder")
    append_start(args)
    clock.seconds = 100
    saved(args, clock, flops=2.4e15, flops_at_start=0.0, started=-20)
    assert (tmp_path / "new" / "folder" / "progress.txt").read_text() == (
        "2025-03-04 05:06:07\tJob ID: 77\t# GPUs: 4\tStarting job\n"
        "2025-03-04 05:07:47\tJob ID: 77\t# GPUs: 4\tSaved checkpoint\tIteration: 50\t"
        "Job throughput: 5.0 TFLOP/s/GPU\tCumulative throughput: 6.0 TFLOP/s/GPU\t"
        "Floating-point operations: 2.40e+15\tTokens (in billions): 0.12\n"
    )


def test_no_scheduler_leaves_the_job_empty(tmp_path: Path, clock: Clock) -> None:
    append_start(arguments(tmp_path))
    assert fields(tmp_path) == [["2025-03-04 05:06:07", "Job ID: ", "# GPUs: 4", "Starting job"]]


def test_cumulative_throughput_spans_jobs_of_the_same_size(tmp_path: Path, clock: Clock) -> None:
    args = arguments(tmp_path)
    append_start(args)
    clock.seconds = 100
    saved(args, clock, flops=4e15, flops_at_start=0.0, started=0)
    clock.seconds = 500  # the first job went on and was lost
    append_start(args)
    clock.seconds = 600
    saved(args, clock, flops=8e15, flops_at_start=4e15, started=500)
    last = fields(tmp_path)[-1]
    assert last[5] == "Job throughput: 10.0 TFLOP/s/GPU"  # 4e15 in 100 s on 4
    assert last[6] == "Cumulative throughput: 3.3 TFLOP/s/GPU"  # 8e15 in 600 s on 4


def test_jobs_of_another_size_end_the_span(tmp_path: Path, clock: Clock) -> None:
    small, large = arguments(tmp_path, world_size=2), arguments(tmp_path, world_size=4)
    append_start(large)
    append_start(small)
    clock.seconds = 100
    saved(small, clock, flops=4e15, flops_at_start=0.0, started=0)
    clock.seconds = 200
    append_start(large)
    clock.seconds = 300
    append_start(large)
    clock.seconds = 400
    saved(large, clock, flops=12e15, flops_at_start=4e15, started=300)
    last = fields(tmp_path)[-1]
    assert last[2] == "# GPUs: 4"
    assert last[5] == "Job throughput: 20.0 TFLOP/s/GPU"
    assert last[6] == "Cumulative throughput: 10.0 TFLOP/s/GPU"  # 12e15 - 4e15, from second 200 to 400


def test_other_events_do_not_count_as_checkpoints(tmp_path: Path, clock: Clock) -> None:
    """The announcement of an asynchronous checkpoint has the same fields under another name."""
    args = arguments(tmp_path)
    append_start(args)
    clock.seconds = 10
    state = TrainState(num_floating_point_operations_so_far=9e15)
    run = SimpleNamespace(args=args, state=state, flops_at_start=0.0, started=BEGIN.timestamp())
    append_saved(run, "Saving async checkpoint")
    append_start(arguments(tmp_path, world_size=1))
    append_start(args)
    clock.seconds = 20
    saved(args, clock, flops=8e15, flops_at_start=0.0, started=10)
    assert fields(tmp_path)[-1][6] == "Cumulative throughput: 200.0 TFLOP/s/GPU"
