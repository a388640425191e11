"""Learning curves of tiny models as committed text, one line a step, at full precision.

They are compared with a tolerance, not bit for bit: processors with other vector instructions add in another order, and
training amplifies the difference from step to step. Between torch's kernels for plain x86, AVX2 and AVX-512
(`ATEN_CPU_CAPABILITY`) the numbers of these curves differed by 2.0e-6 at most; `GOLDEN_TOLERANCE` is fifty times that,
while one step changes the loss by some 5e-3.

To write them anew after a change that is meant to change numbers: `WRITE_GOLDENS=1 bash tests/run.sh FILE`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "goldens"
GOLDEN_TOLERANCE = 1e-4


def compare_with_golden(name: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """The numbers in `columns` of these steps are those of the committed curve `name`."""
    path = FOLDER / f"{name}.txt"
    lines = ["\t".join(columns), *("\t".join(repr(row[column]) for column in columns) for row in rows)]
    if os.environ.get("WRITE_GOLDENS"):
        path.write_text("\n".join(lines) + "\n")
    header, *golden = path.read_text().splitlines()
    assert header == lines[0] and len(golden) == len(rows)
    for step, (row, line) in enumerate(zip(rows, golden), start=1):
        found, wanted = [row[column] for column in columns], list(map(float, line.split("\t")))
        assert found == pytest.approx(wanted, rel=GOLDEN_TOLERANCE), f"step {step} of {path.name}"
