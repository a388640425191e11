"""A timeline as one HTML file that needs no other: readable without scripts, in light and dark, by mouse and keys."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from megatron.training.timeline.chrome_trace import NAMES
from megatron.training.timeline.drawing import boxes_svg, labels_svg, scale_for, sections_of, times_of
from megatron.training.timeline.look import SCRIPT, STYLE
from megatron.training.timeline.spans import MeasuredStep, RankSpans
from megatron.training.timeline.undisturbed import undisturbed

MOST_ROWS = 2000
"""Of the table of all spans; the trace has them all."""


def page(step: MeasuredStep) -> str:
    """The whole document."""
    sections, scale = sections_of(step), scale_for(step)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Timeline of step {step.iteration}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Timeline of step {step.iteration}</h1>
<p class="layout">{escape(layout_in_words(step))}</p>
</header>
<dl class="cards">{"".join(_cards(step))}</dl>
<ul class="legend" aria-label="Colours">{"".join(_legend(step))}</ul>
<div class="chart">
<div class="labels">{labels_svg(sections)}</div>
<div class="boxes" tabindex="-1">{boxes_svg(step, sections, scale)}</div>
</div>
<p id="what" aria-live="polite">Point at a box, or step through them with the arrow keys, to read what it is.</p>
<section>
<h2>Where the time of each rank went</h2>
{_table_of_ranks(step)}
<p class="note">Milliseconds. Collectives inside computations count in both columns. The bubble is the time between
the first and the last computation of a pipeline in which its ranks compute nothing, divided by that time. The plan has
the median time of each computation on each stage, and transfers that cost nothing; “equal stages” is the same
schedule with stages of one length and backward twice as long as forward.
{_flights(step)}{_synchronized(step)}{_disturbed(step)}</p>
</section>
<details>
<summary>All computations, planned and measured</summary>
{_table_of_spans(step)}
</details>
<script>{SCRIPT}</script>
</body>
</html>
"""


def layout_in_words(step: MeasuredStep) -> str:
    """Schedule, sizes and ranks in one line."""
    request, places = step.plan.request, [rank.place for rank in step.ranks]
    sizes = {
        name: len({getattr(place, name) for place in places}) for name in ("tensor", "pipeline", "context", "data")
    }
    ranks = f"{len(step.ranks)} ranks" if len(step.ranks) > 1 else "1 rank"
    cut = ", ".join(f"{name} {size}" for name, size in sizes.items())
    chunks = f" of {request.num_chunks} model chunks" if request.num_chunks > 1 else ""
    name = f"schedule {request.name}, " if request.num_ranks > 1 else ""
    return f"{name}{request.num_microbatches} microbatches, {ranks}{chunks} ({cut})"


def _cards(step: MeasuredStep) -> Iterator[str]:
    alone = undisturbed(step)
    numbers = [
        ("Step", f"{step.seconds * 1e3:.1f} ms"),
        ("Bubble measured", _percent(step.measured_bubble)),
        *([("without other programs", _percent(alone.bubble))] if alone is not None else []),
        ("planned, these times", _percent(step.planned.bubble_fraction)),
        ("planned, equal stages", _percent(step.ideal_bubble)),
        ("Waiting for transfers", _percent(step.share("p2p"))),
        ("In collectives", _percent(step.share("collective"))),
        *([("Hidden of what is in flight", _percent(step.hidden_share))] if step.hidden_share is not None else []),
        ("Optimizer", _percent(step.share("optimizer"))),
    ]
    for name, number in numbers:
        yield f"<div><dt>{escape(name)}</dt><dd>{number}</dd></div>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _legend(step: MeasuredStep) -> Iterator[str]:
    present = {span.kind for rank in step.ranks for span in rank.spans}
    for kind, name in NAMES.items():
        if kind in present:
            swatch = (
                f'<svg width="22" height="14" aria-hidden="true"><rect width="22" height="14" rx="2" class="{kind}"/>'
            )
            yield f"<li>{swatch}</svg>{escape(name)}</li>"


def _table_of_ranks(step: MeasuredStep) -> str:
    table: list[tuple[RankSpans, dict[str, float]]] = []
    for ranks in step.pipelines().values():
        computations = [span for rank in ranks for span in rank.computations]
        first = min((span.start for span in computations), default=0.0)
        last = max((span.end for span in computations), default=0.0)
        table += [(rank, dict(times_of(rank, first, last))) for rank in ranks]
    names = [name for name in table[0][1] if any(times[name] for _, times in table)]
    rows = [
        [f"rank {rank.rank}", str(rank.place), *(f"{times[name] * 1e3:.2f}" for name in names)] for rank, times in table
    ]
    return _table(["", "place", *names], rows)


def _table_of_spans(step: MeasuredStep) -> str:
    rows = [
        [
            f"rank {rank.rank}",
            span.text,
            *(f"{1e3 * seconds:.2f}" for seconds in (plan.start, plan.end, span.start, span.end)),
        ]
        for ranks in step.pipelines().values()
        for rank, planned in zip(ranks, step.planned.ranks)
        for span, plan in zip(rank.computations, planned)
    ]
    heads = ["", "what", "planned begin", "planned end", "measured begin", "measured end"]
    more = f"<p>The first {MOST_ROWS} of {len(rows)}; the trace beside this page has all.</p>" * (len(rows) > MOST_ROWS)
    return _table(heads, rows[:MOST_ROWS]) + more


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Numbers, after a column of names and one of words."""
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="place">{escape(words)}</td>'
        + "".join(f"<td>{number}</td>" for number in numbers)
        + "</tr>"
        for name, words, *numbers in rows
    )
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def _disturbed(step: MeasuredStep) -> str:
    if undisturbed(step) is None:
        return ""
    return (
        f" Computations had a processor for {_percent(step.processor_share)} of their time; “without other programs” "
        "is the bubble if they had had one for all of it."
    )


def _flights(step: MeasuredStep) -> str:
    if step.hidden_share is None:
        return ""
    return (
        " Communication is in flight from its launch until it has been waited for, which may be long after it arrived; "
        "hidden is the part of that in which the rank waits for none."
    )


def _synchronized(step: MeasuredStep) -> str:
    if not step.is_synchronized:
        return ""
    return " While recording, the device was waited for at each border of a box: communication does not overlap here."
