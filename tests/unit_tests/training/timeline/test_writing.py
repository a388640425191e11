"""The trace and the page of a step: whole, self-contained, and with the right numbers."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from megatron.training.timeline.chrome_trace import PLANNED, chrome_trace
from megatron.training.timeline.drawing import ticks
from megatron.training.timeline.page import page
from megatron.training.timeline.spans import MeasuredStep, Span
from tests.unit_tests.training.timeline.steps import perfect_step

# --- the trace ------------------------------------------------------------------------------------


def require_valid(trace: dict[str, Any]) -> None:
    """What Perfetto needs: complete events with times, which lie beside or inside each other on each track."""
    tracks = defaultdict(list)
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= event.keys()
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0 and isinstance(event["cat"], str)
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_ends: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start + 0.002:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 0.002  # microseconds, rounded
            open_ends.append(end)


def test_trace_of_a_step() -> None:
    step = perfect_step(2, 4, replicas=2)
    trace = json.loads(json.dumps(chrome_trace(step)))
    require_valid(trace)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    measured = [event for event in events if event["pid"] < PLANNED]
    counts = Counter(event["cat"] for event in measured)
    assert counts == {"forward": 16, "backward": 16, "collective": 4, "data": 4, "optimizer": 4}
    assert Counter(event["cat"] for event in events if event["pid"] >= PLANNED) == {"forward": 8, "backward": 8}
    first = next(event for event in measured if event["name"] == "F0" and event["pid"] == 0)
    assert (first["ts"], first["dur"]) == (500_000.0, 1000.0) and first["args"]["microbatch"] == 0
    names = {event["args"].get("name") for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert "rank 3 (stage 1, data 1, context 0, tensor 0)" in names and "planned: pipeline rank 1" in names
    assert trace["otherData"]["measured bubble"] == pytest.approx(0.2)


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags with their attributes and checks that they are closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    return reader


def chart_of(html: str) -> ET.Element:
    """The drawing with the boxes."""
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    (chart,) = [svg for svg in found if svg.get("role") == "group"]
    return chart


def test_page_needs_nothing_else() -> None:
    html = page(perfect_step())
    reader = read(html)
    assert not [tag for tag, attributes in reader.tags if attributes.keys() & {"src", "href", "srcset"}]
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#wait"} and "@import" not in html
    assert "http" not in html and "fetch(" not in html
    assert "prefers-color-scheme: dark" in html


def test_page_says_both_bubbles_in_words() -> None:
    text = " ".join(read(page(perfect_step(4, 8))).text)
    assert "Planned: 27.3 % bubble" in text and "Measured: 27.3 % bubble" in text
    assert "schedule 1f1b, 8 microbatches, 4 ranks (tensor 1, pipeline 4, context 1, data 1)" in text


def test_boxes_stand_where_the_times_are() -> None:
    step = perfect_step(2, 4, begin=0.01)
    chart = chart_of(page(step))
    rows = [[box for box in row if box.get("tabindex")] for row in chart.findall("g")]
    assert [len(row) for row in rows] == [8, 8, 10, 10]  # planned twice, then with data and optimizer
    planned, measured = rows[1], [box for box in rows[3] if box.get("class", "")[2:] in ("F", "B")]
    units = float(measured[0].get("width", 0)) / 1e-3  # a forward takes a millisecond
    for plan, box, span in zip(planned, measured, step.ranks[1].computations, strict=True):
        assert float(box.get("x", 0)) == pytest.approx(span.start * units, abs=0.5)
        assert float(box.get("width", 0)) == pytest.approx(span.seconds * units, abs=0.5)
        assert float(plan.get("x", 0)) == pytest.approx(float(box.get("x", 0)), abs=0.5)
    ends = [float(box.get("x", 0)) + float(box.get("width", 0)) for box in planned]
    assert all(float(box.get("x", 0)) >= end - 0.5 for box, end in zip(planned[1:], ends))


def test_boxes_can_be_reached_by_keys_and_read_without_scripts() -> None:
    chart = chart_of(page(perfect_step(2, 3)))
    for row in chart.findall("g"):
        boxes = [box for box in row if box.get("tabindex")]
        assert [box.get("tabindex") for box in boxes] == ["0"] + ["-1"] * (len(boxes) - 1)
        for box in boxes:
            title = box.find("title")
            assert title is not None and title.text == box.get("aria-label") and " ms" in (title.text or "")


def test_texts_are_escaped() -> None:
    html = page(perfect_step(1, 2))
    assert "all-reduce &amp; more" in html and "FORWARD &lt;0&gt;" in html


def test_communication_that_is_too_close_to_tell_apart_is_one_strip() -> None:
    step = perfect_step(1, 2)
    rank = step.ranks[0]
    start = rank.computations[0].start
    crowd = [Span("collective", f"number {i}", start + i * 1e-7, start + (i + 0.5) * 1e-7, 1) for i in range(1000)]
    crowded = replace(rank, spans=tuple(sorted([*rank.spans, *crowd], key=lambda s: (s.start, -s.end))))
    html = page(MeasuredStep(3, (crowded,), step.plan))
    assert html.count('class="s strip collective"') == 1 and "1001 communications" in html


def test_flights_have_a_row_of_their_own_in_lanes() -> None:
    step = perfect_step(1, 2)
    start = step.ranks[0].computations[0].start
    flights = [Span("collective", f"gather {i}", start + i * 1e-4, start + 5e-4 + i * 1e-4) for i in range(2)]
    step = MeasuredStep(3, (replace(step.ranks[0], flights=tuple(flights)),), step.plan)
    rows = chart_of(page(step)).findall("g")
    assert [row.get("aria-label") for row in rows] == ["pipeline rank 0", "rank 0", "in flight"]
    first, second = (box for box in rows[2] if box.get("class") == "s strip collective")
    top, height = float(first.get("y", 0)), float(first.get("height", 0))
    assert float(second.get("y", 0)) >= top + height and 10 < height < 14
    trace = chrome_trace(step)
    require_valid(trace)
    tracks = [(e["name"], e["tid"]) for e in trace["traceEvents"] if e.get("cat") == "in flight"]
    assert tracks == [("gather 0", 1), ("gather 1", 2)]
    assert trace["otherData"]["hidden share of communication in flight"] == pytest.approx(4 / 6)


def test_many_ranks_are_cut_with_a_word() -> None:
    html = page(perfect_step(2, 2, replicas=40))
    assert "the first 64 ranks of 80" in html
    assert len(chart_of(html).findall("g")) == 2 + 64


def test_wide_steps_scroll() -> None:
    few, many = (float(chart_of(page(perfect_step(2, n, begin=1e-3))).get("width", 0)) for n in (4, 200))
    assert few < 1300 and 3 * 15 * 200 <= many <= 9100


@pytest.mark.parametrize("seconds, width", [(1e-4, 1240), (0.0123, 1240), (0.7, 1240), (95.0, 9000)])
def test_ticks_are_round_and_few(seconds: float, width: float) -> None:
    found = ticks(seconds, width)
    assert found[0] == 0 and found[-1] <= seconds and 3 <= len(found) <= width / 100 + 2
    step = f"{found[1]:e}"
    assert float(step.split("e")[0]) in (1, 2, 5)
