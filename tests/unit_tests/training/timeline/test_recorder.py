"""Real steps of the program, recorded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.core.activity import activity, listening
from megatron.training.timeline.chrome_trace import PLANNED
from megatron.training.timeline.recorder import Timeline, as_span, clock_offset, from_first_begin
from megatron.training.timeline.spans import Place, RankSpans, Span
from tests.functional_tests.program import pretrain_gpt
from tests.unit_tests.training.timeline.test_writing import chart_of, read, require_valid
from tests.worker_pool import run_ranks


def trace_of(folder: Path, iteration: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The measured events and the numbers beside them."""
    trace = json.loads((folder / f"step{iteration}.json").read_text())
    require_valid(trace)
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] < PLANNED], trace["otherData"]


def test_a_pipeline_with_replicas(tmp_path: Path) -> None:
    pretrain_gpt(
        4,
        "--train-iters 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        f"--global-batch-size 8 --use-distributed-optimizer --timeline {tmp_path} --timeline-step 2 4",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step2.html", "step2.json", "step4.html", "step4.json"]
    events, numbers = trace_of(tmp_path, 4)
    assert numbers["iteration"] == 4 and 0 < numbers["measured bubble"] < 1
    assert numbers["planned bubble with equal stages"] == pytest.approx(1 / 9)  # (2 - 1) / (2 chunks x 4 + 1)
    for rank in range(4):
        mine = [event for event in events if event["pid"] == rank]
        names = [event["name"] for event in mine if event["tid"] == 0]
        for chunk in ("", ".1"):
            assert [n for n in names if n in [f"F{i}{chunk}" for i in range(4)]] == [f"F{i}{chunk}" for i in range(4)]
            assert {f"B{i}{chunk}" for i in range(4)} <= set(names)
        assert "optimizer" in names
        assert any(name.startswith("reduce-scatter of gradients over the data parallel ranks") for name in names)
        received = [name for name in names if name.startswith("receive of activations of microbatch")]
        assert len(received) == (4 if rank < 2 else 8)  # the first stage gets none for its first chunk
        require_flights(mine)
    assert 0 < numbers["undisturbed bubble"] < 1 and 0 < numbers["planned bubble with even stages"] < 0.2
    done = [event for event in events if event["tid"] == 0]
    assert all(event["tdur"] <= 1.1 * event["dur"] + 100 for event in done)  # processor time, in microseconds
    assert 0 < numbers["hidden share of communication in flight"] < 1
    readers = {event["pid"] for event in events if event["cat"] == "data"}
    assert readers == {0, 1, 2, 3}  # first stages read tokens, last ones labels
    html = (tmp_path / "step4.html").read_text()
    read(html)
    assert len(chart_of(html).findall("g")) == 2 + 4 + 4


def require_flights(events: list[dict[str, Any]]) -> None:
    """On tracks of their own: each begins before the wait for it and ends in it; computations run beside some."""
    waits = [event for event in events if event["tid"] == 0 and event["cat"] in ("collective", "point to point")]
    flights = [event for event in events if event["cat"] == "in flight"]
    computed = [event for event in events if event["cat"] in ("forward", "backward")]
    assert flights and all(event["tid"] > 0 for event in flights)
    beside = 0
    for flight in flights:
        end = flight["ts"] + flight["dur"]
        assert any(flight["ts"] <= one["ts"] <= end for one in waits if one["name"] == flight["name"]), flight
        beside += any(flight["ts"] <= one["ts"] and one["ts"] + one["dur"] <= end for one in computed)
    assert beside


def test_one_process(tmp_path: Path) -> None:
    pretrain_gpt(1, f"--train-iters 2 --timeline {tmp_path} --timeline-step 2")
    events, numbers = trace_of(tmp_path, 2)
    assert [e["name"] for e in events if e["cat"] in ("forward", "backward")] == [
        f"{kind}{i}" for i in range(4) for kind in "FB"
    ]
    assert numbers["planned bubble"] == 0.0 and 0 <= numbers["measured bubble"] < 1


def test_nobody_listens_between_recorded_steps() -> None:
    timeline = Timeline("unused", [3])
    with timeline.recording(2, [], None), activity("forward", microbatch=0) as one:
        pass
    assert one.started > 0  # and neither ranks nor a folder were needed


def test_spans_know_what_is_around_them() -> None:
    heard: list[tuple[activity, float, float]] = []
    listener = listening(lambda one, ended: heard.append((one, ended, time.thread_time())))
    with listener, activity("backward", microbatch=2, chunk=1), activity("read batch"):
        time.sleep(0.03)
        sum(range(10000))
    inner, outer = (as_span(*one, offset=10.0) for one in heard)
    assert 0 < inner.cpu_seconds <= outer.cpu_seconds < outer.seconds - 0.02  # asleep without a processor
    assert (outer.kind, outer.label, outer.depth, inner.kind, inner.depth) == ("B", "B2.1", 0, "data", 1)
    assert outer.text == "backward of microbatch 2 on model chunk 1"
    assert outer.start <= inner.start < inner.end <= outer.end and inner.seconds >= 0.001
    assert outer.start == pytest.approx(heard[1][0].started + 10.0)


def test_time_begins_with_the_first_launch_of_any_rank() -> None:
    wait, flight = Span("collective", "all-gather", 12.0, 13.0), Span("collective", "all-gather", 9.0, 13.0)
    early = RankSpans(0, "", Place(), (wait,), flights=(flight,))
    late = RankSpans(1, "", Place(data=1), (Span("F", "forward", 10.0, 11.0),))
    early, late = from_first_begin([early, late])
    assert [(span.start, span.end) for span in (*early.flights, *early.spans, *late.spans)] == [(0, 4), (3, 4), (1, 2)]


def test_ranks_of_one_machine_have_one_clock() -> None:
    assert run_ranks(2, offset_here) == [0.0, 0.0]


def offset_here() -> float:
    return clock_offset()


def test_clocks_of_two_machines_are_compared() -> None:
    offsets = run_ranks(2, offset_elsewhere)
    assert offsets[0] == 0.0 and abs(offsets[1]) < 0.5


def offset_elsewhere() -> float:
    import torch

    from megatron.training.timeline import recorder

    original, recorder._boot = recorder._boot, lambda: f"machine {torch.distributed.get_rank()}"
    try:
        return recorder.clock_offset()
    finally:
        recorder._boot = original
