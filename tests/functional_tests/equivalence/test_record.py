"""The page shows what was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.functional_tests.equivalence import axes, record
from tests.functional_tests.equivalence.record import EXACT, MATRICES, PAGE, QUANTITIES


def entry(deviation: float, **layout: str) -> dict[str, Any]:
    deviations = {quantity: [0.0, 0.0, ""] for quantity in EXACT}
    deviations |= {quantity: [deviation, 1e-5, "step 1"] for quantity in QUANTITIES}
    violated = ["loss: too far"] if deviation > 1e-5 else []
    return {"layout": layout, "ranks": 2, "deviations": deviations, "violated": violated, "seconds": 1.0}


def test_summary_counts_and_names_the_worst() -> None:
    failed = {**entry(0.0, pp="2"), "deviations": {}, "violated": ["failed: a rank died"]}
    entries = [entry(1e-7, tp="2"), entry(3e-6, cp="2"), failed]
    head = {"designed": 9, "steps": 5, "torch": "2", "machine": "x", "pairs": 7, "pairs_missing": 2}
    lines = record.summary({**head, "layouts": entries})
    assert lines[0].startswith("3 of the 9 layouts")
    assert "They have 5 of the 7 pairs of values." in lines[0]
    assert "**2 are within all bounds.** Initial weights are equal to the bit in 2." in lines[0]
    assert "| gradients | 3.0e-06 | 1.0e-05 | cp=2; step 1 |" in lines
    assert "| copies on several ranks | 0.0e+00 | 0.0e+00 | none in any |" in lines
    assert lines[-1] == "- pp=2: failed: a rank died"
    assert record.table({"layouts": entries})[-1] == "| 2 | pp=2 | - | - | - | - | - |"


@pytest.mark.parametrize("family", list(MATRICES))
def test_page_shows_the_results(family: str) -> None:
    kept = record.results_of(family).read_text()
    results = json.loads(kept)
    assert record.rendered(PAGE.read_text(), results, family) == PAGE.read_text()
    assert record.as_text(results) == kept


def test_stopped_run_is_taken_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known and held is not run again; what failed or lacks is."""
    rows = [axes.plain_row(tp="2"), axes.plain_row(cp="2"), axes.plain_row(pp="2")]
    ran: list[dict[str, str]] = []

    def measured(row: dict[str, str], source: Any) -> dict[str, Any]:
        ran.append(row)
        return entry(1e-7, **record.layouts.not_plain(row))

    kept = tmp_path / "results.json"
    monkeypatch.setattr(record, "results_of", lambda family: kept)
    monkeypatch.setattr(record.layouts, "matrix", lambda: rows)
    two = [frozenset({("tp", "2"), ("cp", size)}) for size in ("1", "2")]
    monkeypatch.setattr(record.layouts, "pairs", lambda: two)
    monkeypatch.setattr(record, "measure_layout", measured)
    record.measure_matrix([entry(2e-7, tp="2"), entry(1.0, cp="2")])
    assert ran == rows[1:]
    found = json.loads(kept.read_text())
    assert [e["deviations"]["loss"][0] for e in found["layouts"]] == [2e-7, 1e-7, 1e-7]
    assert (found["designed"], found["pairs"], found["pairs_missing"]) == (3, 2, 1)
