"""The gate against becoming slower: when it closes, and whether it does now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate
from benchmarks.gpu_rows import batches
from benchmarks.harness import take_turns
from benchmarks.training_steps import prepare_one_process
from tests.worker_pool import run_ranks


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


def a_plant() -> tuple[bool, bool]:
    """Whether the ratio that has just been measured holds, without and with a step that takes 15 % more."""
    prepare_one_process()
    job = gate.JOBS["gpt, bf16"]
    args, steps = gate.contenders(job)
    given = batches(args, "cpu")

    def slower(*batch: Any) -> float:
        begun = time.process_time()
        loss = steps["ours"](*batch)
        ended = time.process_time()
        while time.process_time() < ended + 0.15 * (ended - begun):
            pass
        return loss

    def ratio(rounds: int, ours: Any) -> float:
        turns = take_turns({"ours": ours, "plain": steps["plain"]}, rounds, arguments=given)
        return turns.times_as_fast("ours", "plain")

    accepted = ratio(gate.ROUNDS[-1], steps["ours"])
    holds = [gate.verdict(lambda n, ours=ours: ratio(n, ours), accepted)[0] for ours in (steps["ours"], slower)]
    return holds[0], holds[1]


@pytest.mark.slow
def test_a_step_that_is_15_percent_slower_is_found_out() -> None:
    assert run_ranks(1, a_plant, timeout=400) == [(True, False)]


@pytest.mark.slow
def test_nothing_has_become_slower() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(gate.__file__))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
