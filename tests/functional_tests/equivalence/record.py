"""Run the whole matrix and keep what it measured: `python -m tests.functional_tests.equivalence.record`.

Writes results.json beside this file, one row for each layout, and the tables in docs/equivalence.md, which can also be
made anew from the file alone (`--render`). The file is written after every layout: a run that was stopped is taken up
with `--again`, and its page says how many of the layouts it has.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.covering import Row

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "equivalence.md"
BEGIN, END = "<!-- measured: made by record.py -->", "<!-- end of measured -->"
QUANTITIES = ("loss", "gradients", "gradient norm", "weights", "validation loss")
EXACT = ("initial weights that differ", "copies on several ranks", "gradient of vocabulary padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the tables, from results.json")
    parser.add_argument("--again", action="store_true", help="run only what results.json lacks or what failed there")
    own = parser.parse_args()
    if not own.render:
        measure_matrix(json.loads(RESULTS.read_text())["layouts"] if own.again and RESULTS.exists() else [])
    render(json.loads(RESULTS.read_text()))


def as_text(results: dict[str, Any]) -> str:
    """JSON with one line for each layout, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(row) for row in results["layouts"])
    head = json.dumps({name: value for name, value in results.items() if name != "layouts"}, indent=1)
    return f'{head[:-2]},\n "layouts": [\n{lines}\n]}}\n'


def measure_matrix(known: list[dict[str, Any]]) -> None:
    """Every layout of the matrix with its deviations, worst places included, into results.json one by one."""
    done = {name_of_axes(entry["axes"]): entry for entry in known if not entry["violated"]}
    rows = layouts.matrix()
    head = {"torch": torch.__version__, "machine": platform.machine(), "steps": layouts.STEPS, "designed": len(rows)}
    for number, row in enumerate(rows, start=1):
        name = name_of_axes(row)
        entry = done[name] = done.get(name) or measure_layout(row)
        entries = [done[name] for name in map(name_of_axes, rows) if name in done]
        RESULTS.write_text(as_text({**head, "layouts": entries}))
        words = ", ".join(entry["violated"]) or "ok"
        print(f"{number}/{len(rows)} {layouts.name_of(row)}: {words} ({entry['seconds']} s)", flush=True)


def name_of_axes(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def measure_layout(row: Row) -> dict[str, Any]:
    """One entry of results.json; a run that fails is a violation."""
    started = time.monotonic()
    entry: dict[str, Any] = {"axes": row, "ranks": axes.num_ranks(row), "deviations": {}}
    try:
        found = layouts.deviations(row, layouts.STEPS)
        entry["deviations"] = {
            d.quantity: {"found": d.found, "allowed": d.allowed, "share": d.share, "where": d.where} for d in found
        }
        entry["violated"] = [str(d) for d in found if d.is_violation]
    except AssertionError as failure:
        entry["violated"] = [f"failed: {str(failure)[-500:]}"]
    return entry | {"seconds": round(time.monotonic() - started, 1)}


# --- the page ---


def render(results: dict[str, Any]) -> None:
    """Replace the measured part of docs/equivalence.md."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + "\n".join([BEGIN, *summary(results), "", *table(results), END]) + after)


def summary(results: dict[str, Any]) -> list[str]:
    """What holds for all of them, and the worst of each quantity."""
    entries = results["layouts"]
    ranks = Counter(entry["ranks"] for entry in entries)
    failed = [entry for entry in entries if entry["violated"]]
    lines = [
        f"{len(entries)} of the {results['designed']} layouts "
        f"({', '.join(f'{n} of {r} ranks' for r, n in sorted(ranks.items()))}), "
        f"{results['steps']} steps each, torch {results['torch']}, CPU ({results['machine']}), gloo. "
        f"**{len(entries) - len(failed)} are within all bounds.** Initial weights equal to the bit: "
        f"{sum(not entry['deviations'].get(EXACT[0], {'found': 1})['found'] for entry in entries)}.",
        "",
        "| quantity | largest deviation | allowed there | layout, place |",
        "|---|---|---|---|",
    ]
    for quantity in (*EXACT, *QUANTITIES):
        worst = max(entries, key=lambda e: e["deviations"].get(quantity, {"share": 0})["share"])
        d = worst["deviations"][quantity]
        exact = quantity in EXACT and not d["found"]
        place = "all" if exact else f"{layouts.name_of(worst['axes'])}; {d['where']}"
        lines.append(f"| {quantity} | {d['found']:.1e} | {d['allowed']:.1e} | {place} |")
    lines += [f"- {layouts.name_of(entry['axes'])}: {entry['violated'][0]}" for entry in failed]
    return lines


def table(results: dict[str, Any]) -> list[str]:
    """One line a layout; deviations of gradients and weights are those of the worst parameter."""
    lines = [f"| ranks | layout | {' | '.join(QUANTITIES)} |", f"|---|---|{'---|' * len(QUANTITIES)}"]
    for entry in results["layouts"]:
        cells = [f"{d['found']:.1e}" if (d := entry["deviations"].get(q)) else "-" for q in QUANTITIES]
        lines.append(f"| {entry['ranks']} | {layouts.name_of(entry['axes'])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
