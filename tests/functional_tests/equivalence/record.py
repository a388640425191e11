"""Run a whole matrix and keep what it measured: `python -m tests.functional_tests.equivalence.record [--family bert]`.

Writes results.json (results_bert.json, ...) beside this file, one row for each layout, and the tables in
docs/equivalence.md, which can also be made anew from the file alone (`--render`). The file is written after every
layout: a run that was stopped is taken up with `--again`, and its page says how many of the layouts it has.
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

from tests.functional_tests.equivalence import layouts, sparse
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.equivalence.encoders import FAMILIES
from tests.functional_tests.equivalence.hybrids import HYBRIDS

MATRICES: dict[str, Any] = {"gpt": layouts, **FAMILIES, "sparse": sparse, "hybrids": HYBRIDS}
"""By model family: what has `matrix`, `pairs`, `deviations`, `num_ranks`, `not_plain` and `name_of`."""
PAGE = Path(__file__).resolve().parents[3] / "docs" / "equivalence.md"
QUANTITIES = ("loss", "gradients", "gradient norm", "weights", "validation loss")
EXACT = ("initial weights that differ", "copies on several ranks", "gradient of vocabulary padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=MATRICES, default="gpt")
    parser.add_argument("--render", action="store_true", help="only write the tables, from the results")
    parser.add_argument("--again", action="store_true", help="run only what the results lack or what failed there")
    own = parser.parse_args()
    kept = results_of(own.family)
    if not own.render:
        measure_matrix(json.loads(kept.read_text())["layouts"] if own.again and kept.exists() else [], own.family)
    PAGE.write_text(rendered(PAGE.read_text(), json.loads(kept.read_text()), own.family))


def results_of(family: str) -> Path:
    """Where the results of a family are kept."""
    return Path(__file__).with_name("results.json" if family == "gpt" else f"results_{family}.json")


def as_text(results: dict[str, Any]) -> str:
    """JSON with one line for each layout, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(row) for row in results["layouts"])
    head = json.dumps({name: value for name, value in results.items() if name != "layouts"}, indent=1)
    return f'{head[:-2]},\n "layouts": [\n{lines}\n]}}\n'


def measure_matrix(known: list[dict[str, Any]], family: str = "gpt") -> None:
    """Every layout of the matrix with its deviations, worst places included, into its file one by one."""
    source, kept = MATRICES[family], results_of(family)
    rows, pairs = source.matrix(), source.pairs()
    done = {as_key(entry["layout"]): entry for entry in known if not entry["violated"]}
    head = {"torch": torch.__version__, "machine": platform.machine(), "steps": layouts.STEPS, "designed": len(rows)}
    for number, row in enumerate(rows, start=1):
        key = as_key(source.not_plain(row))
        entry = done[key] = done.get(key) or measure_layout(row, source)
        held = [row for row in rows if as_key(source.not_plain(row)) in done]
        entries = [done[as_key(source.not_plain(row))] for row in held]
        missing = sum(not any(pair <= row.items() for row in held) for pair in pairs)
        results = {**head, "pairs": len(pairs), "pairs_missing": missing, "layouts": entries}
        kept.write_text(as_text(results))
        words = ", ".join(entry["violated"]) or "ok"
        print(f"{number}/{len(rows)} {source.name_of(row)}: {words} ({entry['seconds']} s)", flush=True)


def as_key(values: Row) -> str:
    return json.dumps(values, sort_keys=True)


def measure_layout(row: Row, source: Any = layouts) -> dict[str, Any]:
    """One entry of the results; a run that fails is a violation."""
    started = time.monotonic()
    entry: dict[str, Any] = {"layout": source.not_plain(row), "ranks": source.num_ranks(row), "deviations": {}}
    try:
        found = source.deviations(row, layouts.STEPS)
        entry["deviations"] = {d.quantity: [rounded(d.found), rounded(d.allowed), d.where] for d in found}
        entry["violated"] = [str(d) for d in found if d.is_violation]
    except AssertionError as failure:
        entry["violated"] = [f"failed: {str(failure)[-500:]}"]
    return entry | {"seconds": round(time.monotonic() - started, 1)}


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


# --- the page ---


def rendered(page: str, results: dict[str, Any], family: str = "gpt") -> str:
    """`page` with the tables of these results in place of the family's measured part."""
    begin, end = (f"<!-- {word}{'' if family == 'gpt' else f' {family}'}" for word in ("measured", "end of measured"))
    begin, end = f"{begin}: made by record.py -->", f"{end} -->"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return before + "\n".join([begin, *summary(results), "", *table(results), end]) + after


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
        place = f"{named(worst['layout'])}; {where}" if found else "none in any"
        lines.append(f"| {quantity} | {found:.1e} | {allowed:.1e} | {place} |")
    return [*lines, *(f"- {named(entry['layout'])}: {last_line(entry['violated'][0])}" for entry in failed)]


def named(values: Row) -> str:
    """E.g. `tp=2 pp=2`: values that are not plain."""
    return " ".join(f"{name}={value}" for name, value in values.items()) or "plain"


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
        lines.append(f"| {entry['ranks']} | {named(entry['layout'])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
