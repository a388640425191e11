"""Whatever instant a run dies at, and whoever dies: the checkpoint that the tracker names is whole, it is the one that
was saved, and training goes on from it bit for bit.

The instants are random, over many saves. `CRASH_TABLE=file.json` keeps what was done and found.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.manifest import damaged_files, read_manifest
from megatron.training.checkpoint.paths import saved_iterations
from tests.unit_tests.training.checkpoint.crash_nursery import Habit, Nursery, continued, uninterrupted
from tests.unit_tests.training.checkpoint.tiny_run import Plan
from tests.worker_pool import run_ranks

SMALL = Plan(tp=2, layers=2, dist_opt=True)
HABITS = {
    "torch_dist": Habit(SMALL),
    "torch_dist in the background": Habit(SMALL, background=True),
    "safetensors in the background, one process": Habit(replace(SMALL, format="safetensors"), True, True),
    "torch": Habit(replace(SMALL, tp=1, dist_opt=False, format="torch")),
    "torch_dist, a full disk": Habit(SMALL, limit=60_000),
    "torch_dist in the background, a full disk": Habit(SMALL, background=True, limit=60_000),
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


Record = dict[str, object]


@cache
def reference_of(plan: Plan, steps: int) -> list[list[str]]:
    """Digests of a run that nobody kills, by rank; the format of its checkpoints does not matter to it."""
    if plan.format != "torch_dist":
        return reference_of(replace(plan, format="torch_dist"), steps)
    return run_ranks(plan.size, uninterrupted, plan, steps, timeout=600)


def crash(nursery: Nursery, habit: Habit, folder: Path, rounds: int, seed: int, most_steps: int) -> list[Record]:
    """Kill a run `rounds` times; after each, what is left must be what an uninterrupted run had."""
    chance = random.Random(seed)
    size = habit.plan.size
    reference = reference_of(habit.plan, most_steps)
    latest, records = 0, list[Record]()
    for number in range(rounds):
        victims = list(range(size)) if number % 2 == 0 else [chance.randrange(size)]
        delay = chance.uniform(0, 0.15)
        latest, progressed = nursery.run_and_kill(habit, folder, victims, latest, delay)
        assert progressed, "the run saved nothing"
        assert latest + 1 < most_steps, "the reference is too short for this machine"
        partial = len(list(folder.glob("iter_*.tmp-*")))
        flags = {**habit.flags, "exit_on_missing_checkpoint": True}
        for rank, (iteration, loaded, later) in enumerate(run_ranks(size, continued, habit.plan, str(folder), flags)):
            assert iteration == latest, "the tracker names a checkpoint that does not verify"
            assert loaded == reference[rank][iteration], f"iteration {iteration} holds something else"
            assert later == reference[rank][iteration + 1], "training does not go on as it would have"
        for whole in saved_iterations(folder):
            directory = folder / f"iter_{whole:07d}"
            manifest = read_manifest(directory)
            assert manifest is not None and damaged_files(directory, manifest) == [], "a partial file looks whole"
        records.append(
            {
                "killed": victims,
                "of": size,
                "after seconds": round(delay, 3),
                "iteration": latest,
                "unfinished": partial,
            }
        )
    return records


@pytest.mark.parametrize("name", HABITS)
def test_kills_at_random_instants(tmp_path: Path, nursery: Nursery, name: str) -> None:
    folder = tmp_path / "saved"
    crash(nursery, HABITS[name], folder, rounds=3, seed=len(name), most_steps=50)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", HABITS)
def test_many_kills_at_random_instants(tmp_path: Path, nursery: Nursery, name: str) -> None:
    folder = tmp_path / "saved"
    records = crash(nursery, HABITS[name], folder, rounds=20, seed=100 + len(name), most_steps=600)
    table = os.environ.get("CRASH_TABLE")
    if table:
        path = Path(table)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: records}, indent=1) + "\n")


# ---- a disk that is really full ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system of limited size cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_keeps_what_it_has(small_disk: Path, background: bool) -> None:
    (messages,) = run_ranks(1, fill_disk, str(small_disk), background)
    assert "No space left on device" in messages[0]
    names = sorted(path.name for path in (small_disk / "saved").iterdir())
    assert names == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert run_ranks(1, continued, Plan(), str(small_disk / "saved"), {})[0][0] == 1


def fill_disk(disk: str, background: bool) -> list[str]:
    import contextlib
    import io

    from megatron.core.dist_checkpointing.core import CheckpointingException
    from tests.unit_tests.training.checkpoint.tiny_run import TinyRun

    run = TinyRun(Plan())
    folder = f"{disk}/saved"
    messages = []
    with contextlib.redirect_stdout(io.StringIO()):
        run.train(1)
        run.save(folder)
        free = shutil.disk_usage(disk).free
        with open(f"{disk}/filler", "wb") as file:
            file.write(bytes(max(0, free - 100_000)))
        run.train(1)
        try:
            run.save(folder, async_save=background)
            run.checkpoints.finish(blocking=True)
        except CheckpointingException as error:
            messages.append(str(error))
    return messages
