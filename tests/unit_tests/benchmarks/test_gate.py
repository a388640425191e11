"""The gate against becoming slower: when it closes, and whether it does now."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    measure, asked = measuring(*[1.0 / 1.15] * 3)
    assert not gate.verdict(measure, 1.0)[0]
    measure, asked = measuring(0.8, 0.85, 0.7)
    assert gate.verdict(measure, 1.0) == (False, 0.85) and asked == list(gate.ROUNDS)


def test_each_job_has_an_accepted_ratio() -> None:
    accepted = json.loads(gate.EXPECTED.read_text(encoding="utf-8"))["rows"]
    assert accepted.keys() == gate.JOBS.keys()
    assert all(0.5 < row["ratio"] < 3 for row in accepted.values())


def share_found_slower(row: dict[str, Any], times: float, verdicts: int = 300) -> float:
    """Of verdicts by rounds drawn from those that were accepted, ours taking so many times as long."""
    pairs, drawn = list(zip(row["rounds"]["ours"], row["rounds"]["plain"], strict=True)), random.Random(0)

    def measure(rounds: int) -> float:
        return statistics.median(plain / (ours * times) for ours, plain in drawn.choices(pairs, k=rounds))

    return sum(not gate.verdict(measure, row["ratio"])[0] for _ in range(verdicts)) / verdicts


@pytest.mark.parametrize("job", gate.JOBS)
def test_15_percent_are_found_in_the_noise_of_real_rounds_and_nothing_where_nothing_is(job: str) -> None:
    row = json.loads(gate.EXPECTED.read_text(encoding="utf-8"))["rows"][job]
    assert share_found_slower(row, 1.0) == 0.0
    assert share_found_slower(row, 1.15) > 0.8


@pytest.mark.slow
def test_nothing_has_become_slower() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(gate.__file__))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
