"""Records what all ranks do in chosen steps, and has rank 0 write it down."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core import device, parallel_state
from megatron.core.activity import activity, communicating, listening
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.executor import ACTIVITIES
from megatron.core.pipeline_parallel.schedules import plan_for, schedule_request
from megatron.training.activity_names import in_words
from megatron.training.timeline.chrome_trace import chrome_trace
from megatron.training.timeline.page import page
from megatron.training.timeline.spans import MeasuredStep, Place, RankSpans, Span, SpanKind

_COMPUTE: dict[str, SpanKind] = {name: kind.value for kind, name in ACTIVITIES.items()}
_CLOCK_ROUNDS = 5

Heard = tuple[activity, float, float]
"""An activity, and `perf_counter` and `thread_time` at its end."""


class Timeline:
    """Writes `step<N>.html` and `step<N>.json` for each iteration of `--timeline-step` into the `--timeline` folder.

    Between those steps it costs nothing.
    """

    def __init__(self, folder: str | None, iterations: list[int]) -> None:
        self.folder = Path(folder) if folder else None
        self.iterations = frozenset(iterations) if folder else frozenset()

    @contextmanager
    def recording(self, iteration: int, model: list[Any], config: Any) -> Iterator[None]:
        """Record what happens inside if `iteration` is one of the chosen. Communicates then: all ranks come together
        before and after.
        """
        if iteration not in self.iterations:
            yield
            return
        assert self.folder is not None
        offset = clock_offset()
        heard: list[Heard] = []
        parallel_state.barrier()
        begun = time.process_time()
        with listening(
            lambda one, ended: heard.append((one, ended, time.thread_time())),
            None if device.is_cpu() else device.synchronize,
        ):
            yield
        step = _gather(iteration, heard, offset, time.process_time() - begun, len(model), config)
        if dist.get_rank() == 0:
            write_step(step, self.folder)


def write_step(step: MeasuredStep, folder: Path) -> None:
    """The trace and the page of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"step{step.iteration}.json"
    trace.write_text(json.dumps(chrome_trace(step)))
    (folder / f"step{step.iteration}.html").write_text(page(step), encoding="utf-8")


def clock_offset() -> float:
    """Seconds to add to this rank's `time.perf_counter()` to get rank 0's. Communicates: barriers, all-gather.

    On one machine that clock is the same for all processes. Between machines it is taken at the end of barriers, which
    all ranks leave within a network's latency.
    """
    times = []
    for _ in range(_CLOCK_ROUNDS):
        parallel_state.barrier()
        times.append(time.perf_counter())
    mine = (_boot(), times)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    boot, first = everyone[0]
    return 0.0 if boot == mine[0] else statistics.median(a - b for a, b in zip(first, times))


def _boot() -> str:
    """Names this machine since it was last started."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _gather(
    iteration: int, heard: list[Heard], offset: float, cpu_seconds: float, num_chunks: int, config: Any
) -> MeasuredStep:
    place = Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    spans, flights = (_in_order(as_span(*one, offset) for one in heard if one[0].is_flight is x) for x in (False, True))
    host = f"{socket.gethostname()}, pid {os.getpid()}"
    mine = RankSpans(dist.get_rank(), host, place, spans, cpu_seconds, flights)
    everyone: list[Any] = [None] * dist.get_world_size()
    with communicating("all-gather", None, of="spans of the timeline"):
        dist.all_gather_object(everyone, mine)
    request = schedule_request(
        config, parallel_state.get_pipeline_model_parallel_world_size(), num_chunks, get_num_microbatches()
    )
    ranks = from_first_begin(everyone)
    return MeasuredStep(iteration, ranks, plan_for(config, request), is_synchronized=not device.is_cpu())


def _in_order(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(sorted(spans, key=lambda span: (span.start, -span.end)))


def from_first_begin(ranks: Sequence[RankSpans]) -> tuple[RankSpans, ...]:
    """The same in seconds from the first begin of anything, launches of what is in flight included."""
    start = min((span.start for rank in ranks for span in (*rank.spans, *rank.flights)), default=0.0)

    def earlier(spans: Iterable[Span]) -> tuple[Span, ...]:
        return tuple(replace(span, start=span.start - start, end=span.end - start) for span in spans)

    return tuple(replace(rank, spans=earlier(rank.spans), flights=earlier(rank.flights)) for rank in ranks)


def as_span(one: activity, ended: float, cpu_ended: float = 0.0, offset: float = 0.0) -> Span:
    """An activity as a span on rank 0's clock."""
    depth, outer = 0, one.outer
    while outer is not None:
        depth, outer = depth + 1, outer.outer
    microbatch, chunk = one.details.get("microbatch"), one.details.get("chunk")
    words = in_words(one)
    if one.name in _COMPUTE:
        words = f"{one.name} of microbatch {microbatch}" + (f" on model chunk {chunk}" if chunk else "")
    begin, end = one.started + offset, ended + offset
    if one.is_flight:
        return Span(_kind(one), words, begin, end, 0, microbatch, chunk)
    return Span(_kind(one), words, begin, end, depth, microbatch, chunk, one.cpu_started, cpu_ended)


def _kind(one: activity) -> SpanKind:
    if one.name in _COMPUTE:
        return _COMPUTE[one.name]
    if one.waits:
        return "p2p" if one.peer is not None and one.name in ("send", "receive", "exchange") else "collective"
    if one.name == "optimizer":
        return "optimizer"
    return "data" if one.name == "read batch" else "other"
