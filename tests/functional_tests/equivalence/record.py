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
    rows = layouts.matrix()
    done = {as_key(entry["layout"]): entry for entry in known if not entry["violated"]}
    head = {"torch": torch.__version__, "machine": platform.machine(), "steps": layouts.STEPS, "designed": len(rows)}
    for number, row in enumerate(rows, start=1):
        key = as_key(layouts.not_plain(row))
        entry = done[key] = done.get(key) or measure_layout(row)
        RESULTS.write_text(as_text({**head, **measured(rows, done)}))
        words = ", ".join(entry["violated"]) or "ok"
        print(f"{number}/{len(rows)} {layouts.name_of(row)}: {words} ({entry['seconds']} s)", flush=True)


def measured(rows: list[Row], done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The entries there are, in the order of `rows`, and how many of all pairs of values they have."""
    held = [row for row in rows if as_key(layouts.not_plain(row)) in done]
    missing = sum(not any(pair <= row.items() for row in held) for pair in layouts.pairs())
    entries = [done[as_key(layouts.not_plain(row))] for row in held]
    return {"pairs": len(layouts.pairs()), "pairs_missing": missing, "layouts": entries}


def as_key(values: Row) -> str:
    return json.dumps(values, sort_keys=True)


def measure_layout(row: Row) -> dict[str, Any]:
    """One entry of results.json; a run that fails is a violation."""
    started = time.monotonic()
    entry: dict[str, Any] = {"layout": layouts.not_plain(row), "ranks": axes.num_ranks(row), "deviations": {}}
    try:
        found = layouts.deviations(row, layouts.STEPS)
        entry["deviations"] = {d.quantity: [rounded(d.found), rounded(d.allowed), d.where] for d in found}
        entry["violated"] = [str(d) for d in found if d.is_violation]
    except AssertionError as failure:
        entry["violated"] = [f"failed: {str(failure)[-500:]}"]
    return entry | {"seconds": round(time.monotonic() - started, 1)}


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


# --- the page ---


def render(results: dict[str, Any]) -> None:
    """Replace the measured part of docs/equivalence.md."""
    PAGE.write_text(rendered(PAGE.read_text(), results))


def rendered(page: str, results: dict[str, Any]) -> str:
    """`page` with the tables of these results."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + "\n".join([BEGIN, *summary(results), "", *table(results), END]) + after


def summary(results: dict[str, Any]) -> list[str]:
    """What holds for all of them, and the worst of each quantity."""
    entries = results["layouts"]
    ranks = Counter(entry["ranks"] for entry in entries)
    failed = [entry for entry in entries if entry["violated"]]
    same = sum(found_in(entry, EXACT[0]) == 0.0 for entry in entries)
    lines = [
        f"{len(entries)} of the {results['designed']} layouts of the design "
        f"({', '.join(f'{n} of {r} ranks' for r, n in sorted(ranks.items()))}), "
        f"{results['steps']} steps each, torch {results['torch']}, CPU ({results['machine']}), gloo. "
        f"They have {results['pairs'] - results['pairs_missing']} of the {results['pairs']} pairs of values. "
        f"**{len(entries) - len(failed)} are within all bounds.** Initial weights are equal to the bit in {same}.",
        "",
        "| quantity | largest deviation | allowed there | layout, place |",
        "|---|---|---|---|",
    ]
    for quantity in (*EXACT, *QUANTITIES):
        worst = max(entries, key=lambda entry: share_of_allowed(entry, quantity))
        found, allowed, where = worst["deviations"][quantity]
        place = f"{layouts.name_of(worst['layout'])}; {where}" if found else "none in any"
        lines.append(f"| {quantity} | {found:.1e} | {allowed:.1e} | {place} |")
    return [*lines, *(f"- {layouts.name_of(entry['layout'])}: {last_line(entry['violated'][0])}" for entry in failed)]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def found_in(entry: dict[str, Any], quantity: str) -> float | None:
    """A deviation; None for a run that failed."""
    return entry["deviations"][quantity][0] if entry["deviations"] else None


def share_of_allowed(entry: dict[str, Any], quantity: str) -> float:
    if not entry["deviations"]:
        return -1.0
    found, allowed, _ = entry["deviations"][quantity]
    return found / allowed if allowed else found


def table(results: dict[str, Any]) -> list[str]:
    """One line a layout; deviations of gradients and weights are those of the worst parameter."""
    lines = [f"| ranks | layout | {' | '.join(QUANTITIES)} |", f"|---|---|{'---|' * len(QUANTITIES)}"]
    for entry in results["layouts"]:
        found = [found_in(entry, quantity) for quantity in QUANTITIES]
        cells = ["-" if value is None else f"{value:.1e}" for value in found]
        lines.append(f"| {entry['ranks']} | {layouts.name_of(entry['layout'])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
