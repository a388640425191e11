"""The rows of a timeline as SVG: one row a rank, one box a span, the same scale for plan and measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from megatron.core.pipeline_parallel.schedule import Compute
from megatron.training.timeline.chrome_trace import NAMES
from megatron.training.timeline.spans import MeasuredStep, RankSpans, Span, lanes

ROW, GAP, HEADING, AXIS = 28, 6, 30, 26
LABELS = 150
LEAST_WIDTH, MOST_WIDTH = 1240.0, 9000.0
LEAST_BOX = 15.0
"""A forward pass of usual length is at least this wide, as long as the whole is below `MOST_WIDTH`."""
MOST_RANKS = 64
CHARACTER = 6.4
"""Width of a character of a box's label."""


@dataclass(frozen=True)
class Scale:
    """From seconds to horizontal units."""

    units_per_second: float

    def x(self, seconds: float) -> float:
        """Place of a time."""
        return round(seconds * self.units_per_second, 2)


@dataclass(frozen=True)
class Row:
    """One line of the picture."""

    label: str
    note: str
    """Shown when the label is pointed at."""
    spans: Sequence[Span]
    overlaps: bool = False
    """Whether spans lie beside each other, in lanes."""


@dataclass(frozen=True)
class Section:
    """Rows under a heading."""

    heading: str
    rows: Sequence[Row]

    @property
    def height(self) -> float:
        """With its heading."""
        return HEADING + len(self.rows) * (ROW + GAP)


def sections_of(step: MeasuredStep) -> list[Section]:
    """The plan, then the measured ranks by pipeline."""
    first = min((span.start for rank in step.ranks for span in rank.computations), default=0.0)
    planned = [
        Row(
            f"pipeline rank {i}",
            "as the schedule plans it, with the measured times of its computations and transfers that cost nothing",
            [_planned_span(one.compute, one.start + first, one.end + first) for one in spans],
        )
        for i, spans in enumerate(step.planned.ranks)
    ]
    pipelines = list(step.pipelines().values())
    shown = [rank for pipeline in pipelines for rank in pipeline][:MOST_RANKS]
    rows = [row for rank in shown for row in _rows_of(rank, step)]
    left_out = f", the first {MOST_RANKS} ranks of {len(step.ranks)}" if len(step.ranks) > MOST_RANKS else ""
    return [
        Section(f"Planned: {_percent(step.planned.bubble_fraction)} bubble", planned),
        Section(f"Measured: {_percent(step.measured_bubble)} bubble{left_out}", rows),
    ]


def _rows_of(rank: RankSpans, step: MeasuredStep) -> Iterator[Row]:
    """What a rank does and, below it, what is under way meanwhile."""
    yield Row(_label(rank, step), f"{rank.place}; {rank.host}", rank.spans)
    if rank.flights:
        yield Row("in flight", "communication from its launch until it has been waited for", rank.flights, True)


def _label(rank: RankSpans, step: MeasuredStep) -> str:
    stages = step.plan.request.num_ranks
    return f"rank {rank.rank}, stage {rank.place.pipeline}" if 1 < stages < len(step.ranks) else f"rank {rank.rank}"


def _planned_span(compute: Compute, start: float, end: float) -> Span:
    kind = compute.kind.value
    words = f"planned {NAMES[kind]} of microbatch {compute.microbatch}"
    words += f" on model chunk {compute.chunk}" if compute.chunk else ""
    return Span(kind, words, start, end, 0, compute.microbatch, compute.chunk)  # type: ignore[arg-type]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def scale_for(step: MeasuredStep) -> Scale:
    """Wide enough to read the boxes of usual length."""
    lengths = sorted(span.seconds for rank in step.ranks for span in rank.computations)
    usual = lengths[len(lengths) // 4] if lengths else 0.0
    seconds = max(step.seconds, 1e-6)
    width = LEAST_BOX / usual * seconds if usual else LEAST_WIDTH
    return Scale(min(max(width, LEAST_WIDTH), MOST_WIDTH) / seconds)


# --- the two drawings -----------------------------------------------------------------------------


def labels_svg(sections: Sequence[Section]) -> str:
    """The names of the rows, which stay where they are when the boxes scroll."""
    parts, y = [], 0.0
    for section in sections:
        y += HEADING
        for row in section.rows:
            parts.append(
                f'<text x="{LABELS - 12}" y="{y + ROW / 2 + 4:g}" text-anchor="end" class="label">{escape(row.label)}'
                f"<title>{escape(row.note)}</title></text>"
            )
            y += ROW + GAP
    height = _height(sections)
    return f'<svg width="{LABELS}" height="{height:g}" role="presentation">{"".join(parts)}</svg>'


def boxes_svg(step: MeasuredStep, sections: Sequence[Section], scale: Scale) -> str:
    """The boxes and the time axis."""
    width, height = scale.x(step.seconds) + 24, _height(sections)
    parts = [_PATTERN, *_axis(step.seconds, height, scale)]
    y = 0.0
    for section in sections:
        parts.append(f'<text x="0" y="{y + 20:g}" class="heading">{escape(section.heading)}</text>')
        y += HEADING
        for row in section.rows:
            parts += _row(row, y, scale, step.seconds)
            y += ROW + GAP
    return (
        f'<svg width="{width:g}" height="{height:g}" role="group" aria-label="Spans of time, one row a rank">'
        f"{''.join(parts)}</svg>"
    )


def _height(sections: Sequence[Section]) -> float:
    return sum(section.height for section in sections) + AXIS


_PATTERN = (
    '<defs><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" class="wait-ground"/><rect width="2" height="6" class="wait-line"/></pattern></defs>'
)


def _row(row: Row, y: float, scale: Scale, seconds: float) -> Iterator[str]:
    yield f'<g role="list" aria-label="{escape(row.label)}">'
    yield f'<rect x="0" y="{y:g}" width="{scale.x(seconds):g}" height="{ROW}" class="track"/>'
    if row.overlaps:
        beside = lanes(row.spans)
        height = ROW / len(beside)
        for i, lane in enumerate(beside):
            yield from _strips(lane, y + i * height, max(height - 0.5, 0.5), scale)
    else:
        outer = [span for span in row.spans if span.depth == 0]
        for i, span in enumerate(outer):
            yield _box(span, y, scale, is_first=i == 0)
        inner = [span for span in row.spans if span.depth and span.kind in ("p2p", "collective")]
        yield from _strips(inner, y + ROW - 7, 6, scale)  # communication inside computations, at their lower edge
    yield "</g>"


def _box(span: Span, y: float, scale: Scale, is_first: bool) -> str:
    x, width = scale.x(span.start), max(scale.x(span.end) - scale.x(span.start), 0.6)
    inset = 4 if span.kind == "p2p" else 0
    words = f"{span.text}: {_ms(span.seconds)}, from {_ms(span.start)} to {_ms(span.end)}"
    label = ""
    if span.label and width > CHARACTER * len(span.label) + 3:
        label = f'<text x="{x + width / 2:g}" y="{y + ROW / 2 + 4:g}" class="on-{span.kind}">{span.label}</text>'
    shade = " odd" if (span.chunk or 0) % 2 else ""
    return (
        f'<rect x="{x:g}" y="{y + inset:g}" width="{width:g}" height="{ROW - 2 * inset}" rx="2" '
        f'class="s {span.kind}{shade}" role="listitem" tabindex="{0 if is_first else -1}" '
        f'aria-label="{escape(words)}"><title>{escape(words)}</title></rect>{label}'
    )


def _strips(spans: Iterable[Span], y: float, height: float, scale: Scale) -> Iterator[str]:
    """Low boxes of communication; what is too close to tell apart is one."""
    open_span: tuple[float, float, float, int, str, str] | None = None
    for span in sorted(spans, key=lambda span: span.start):
        x, end = scale.x(span.start), scale.x(span.end)
        if open_span is not None and x - open_span[1] < 1.0 and span.kind == open_span[4]:
            first, last, total, count, kind, text = open_span
            open_span = (first, max(end, last), total + span.seconds, count + 1, kind, text)
            continue
        if open_span is not None:
            yield _strip(open_span, y, height)
        open_span = (x, end, span.seconds, 1, span.kind, span.text)
    if open_span is not None:
        yield _strip(open_span, y, height)


def _strip(merged: tuple[float, float, float, int, str, str], y: float, height: float) -> str:
    x, end, seconds, count, kind, text = merged
    words = f"{text}: {_ms(seconds)}" if count == 1 else f"{count} communications, the first: {text}; {_ms(seconds)}"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(end - x, 0.6):g}" height="{height:g}" '
        f'class="s strip {kind}"><title>{escape(words)}</title></rect>'
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _axis(seconds: float, height: float, scale: Scale) -> Iterator[str]:
    base = height - AXIS
    for tick in ticks(seconds, scale.x(seconds)):
        x = scale.x(tick)
        yield f'<line x1="{x:g}" y1="{HEADING}" x2="{x:g}" y2="{base + 4:g}" class="grid"/>'
        anchor = "start" if tick == 0 else "middle"
        yield f'<text x="{x:g}" y="{base + 18:g}" text-anchor="{anchor}" class="tick">{tick * 1e3:g} ms</text>'


def ticks(seconds: float, width: float) -> list[float]:
    """Round times, about 110 units apart."""
    wanted = seconds / max(1.0, width / 110)
    step = next(
        (factor * 10.0**power for power in range(-7, 5) for factor in (1, 2, 5) if factor * 10.0**power >= wanted),
        seconds,
    )
    return [round(i * step, 9) for i in range(int(seconds / step) + 1)]


def times_of(rank: RankSpans, first: float, last: float) -> list[tuple[str, float]]:
    """What a rank's step was made of, for a table: name and seconds. Idle is the time between `first` and `last`,
    of the computations of its pipeline, in which it computed nothing."""
    computing = sum(span.seconds for span in rank.computations)
    return [
        ("forward", rank.seconds_of("F")),
        ("backward", rank.seconds_of("B", "I")),
        ("weight gradients", rank.seconds_of("W")),
        ("waiting for transfers", rank.seconds_of("p2p")),
        ("collectives", rank.seconds_of("collective")),
        ("in flight", rank.seconds_in_flight),
        ("of it hidden", rank.seconds_hidden),
        ("optimizer", rank.seconds_of("optimizer")),
        ("reading data", rank.seconds_of("data")),
        ("idle in the pipeline", max(0.0, last - first - computing)),
    ]
