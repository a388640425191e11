"""A step in the trace event format that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from megatron.training.timeline.spans import MeasuredStep, RankSpans, Span, lanes
from megatron.training.timeline.undisturbed import undisturbed

NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "p2p": "point to point",
    "collective": "collective",
    "optimizer": "optimizer",
    "data": "data",
    "other": "other",
}
IN_FLIGHT = "in flight"
PLANNED = 1_000_000
"""Planned ranks are numbered from here on, so that they stand below the measured ones."""


def chrome_trace(step: MeasuredStep) -> dict[str, Any]:
    """Complete events ("X") in microseconds: a process for each rank, then one for each planned pipeline rank.

    Thread 0 of a rank is what it does; those from 1 on, what is in flight beside that.
    """
    events: list[dict[str, Any]] = []
    for rank in step.ranks:
        events += _named(rank.rank, f"rank {rank.rank} ({rank.place})", rank.rank)
        for span in rank.spans:
            args: dict[str, Any] = {"what": span.text}
            if span.microbatch is not None:
                args["microbatch"] = span.microbatch
            if span.chunk is not None:
                args["chunk"] = span.chunk
            event = _event(rank.rank, span.label or span.text, NAMES[span.kind], span.start, span.end, args)
            events.append({**event, **_thread_clock(span)})
        events += _flights(rank)
    for stage, spans in enumerate(step.planned.ranks):
        events += _named(PLANNED + stage, f"planned: pipeline rank {stage}", PLANNED + stage)
        for planned in spans:
            compute = planned.compute
            args = {"microbatch": compute.microbatch, "chunk": compute.chunk}
            name = NAMES[compute.kind.value]
            events.append(_event(PLANNED + stage, repr(compute), name, planned.start, planned.end, args))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": numbers_of(step)}


def numbers_of(step: MeasuredStep) -> dict[str, float | None]:
    """What the spans add up to: shares of 1, and seconds."""
    alone = undisturbed(step)
    return {
        "iteration": step.iteration,
        "seconds": step.seconds,
        "processor seconds of all ranks": sum(rank.cpu_seconds for rank in step.ranks),
        "processor share of computations": step.processor_share,
        "in collectives": step.share("collective"),
        "waiting for transfers": step.share("p2p"),
        "hidden share of communication in flight": step.hidden_share,
        "measured bubble": step.measured_bubble,
        "undisturbed bubble": alone and alone.bubble,
        "undisturbed bubble without transfers": alone and alone.bubble_without_transfers,
        "planned bubble": step.planned.bubble_fraction,
        "planned bubble with even stages": alone and alone.even_bubble,
        "planned bubble with equal stages": step.ideal_bubble,
    }


def _flights(rank: RankSpans) -> list[dict[str, Any]]:
    """Tracks of what is in flight, beside each other where they overlap."""
    events: list[dict[str, Any]] = []
    for number, lane in enumerate(lanes(rank.flights), start=1):
        events.append(_label(rank.rank, "thread_name", number, name=f"in flight, {number}"))
        for span in lane:
            event = _event(rank.rank, span.text, IN_FLIGHT, span.start, span.end, {"what": span.text})
            events.append({**event, "tid": number})
    return events


def _thread_clock(span: Span) -> dict[str, float]:
    if not span.cpu_end:
        return {}
    return {"tts": round(span.cpu_start * 1e6, 3), "tdur": round(span.cpu_seconds * 1e6, 3)}


def _named(process: int, name: str, order: int) -> list[dict[str, Any]]:
    return [_label(process, "process_name", name=name), _label(process, "process_sort_index", sort_index=order)]


def _label(process: int, what: str, track: int = 0, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": args}


def _event(process: int, name: str, category: str, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    begin, length = round(start * 1e6, 3), round((end - start) * 1e6, 3)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": 0,
        "ts": begin,
        "dur": length,
        "args": args,
    }
