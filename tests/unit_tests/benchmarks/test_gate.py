"""The gate against becoming slower: when it closes, and whether it does now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate


def measuring(*ratios: float):
    """One ratio after the other, and the rounds that were asked for."""
    asked: list[int] = []

    def measure(rounds: int) -> float:
        asked.append(rounds)
        return ratios[len(asked) - 1]

    return measure, asked


def test_verdicts() -> None:
    measure, asked = measuring(1.0)
    assert gate.verdict(measure, 1.05) == (True, 1.0) and asked == [gate.ROUNDS[0]]
    measure, asked = measuring(0.8, 1.04)
    assert gate.verdict(measure, 1.1) == (True, 1.04) and asked == list(gate.ROUNDS[:2])
    measure, asked = measuring(0.8, 0.85, 0.7)
    assert gate.verdict(measure, 1.0) == (False, 0.85) and asked == list(gate.ROUNDS)


def test_each_job_has_an_accepted_ratio() -> None:
    accepted = json.loads(gate.EXPECTED.read_text(encoding="utf-8"))["rows"]
    assert accepted.keys() == gate.JOBS.keys()
    assert all(0.5 < row["ratio"] < 3 for row in accepted.values())


@pytest.mark.slow
def test_nothing_has_become_slower() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(gate.__file__))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
