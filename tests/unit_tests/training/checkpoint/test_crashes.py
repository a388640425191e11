"""Whatever instant a run dies at, and whoever dies: the checkpoint that the tracker names is whole, it is the one that
was saved, and training goes on from it bit for bit.

Runs die before chosen operations on files, and (slow) before every one and at random instants over many saves.
`CRASH_TABLE=file.json` keeps what was done and found.
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


def check_what_is_left(habit: Habit, folder: Path, latest: int, reference: list[list[str]]) -> None:
    """The latest checkpoint is what an uninterrupted run had, and goes on like it; whatever looks whole is whole."""
    flags = {**habit.flags, "exit_on_missing_checkpoint": True}
    found = run_ranks(habit.plan.size, continued, habit.plan, str(folder), flags)
    for rank, (iteration, loaded, later) in enumerate(found):
        assert iteration == latest, "the tracker names a checkpoint that does not verify"
        assert loaded == reference[rank][iteration], f"iteration {iteration} holds something else"
        assert later == reference[rank][iteration + 1], "training does not go on as it would have"
    for whole in saved_iterations(folder):
        directory = folder / f"iter_{whole:07d}"
        manifest = read_manifest(directory)
        assert manifest is not None and damaged_files(directory, manifest) == [], "a partial file looks whole"


def keep(name: str, records: list[Record]) -> None:
    """Write down what was done, if that is asked for."""
    table = os.environ.get("CRASH_TABLE")
    if table:
        path = Path(table)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: records}, indent=1) + "\n")


# ---- before operations on files ----

INSTANTS = {
    "a part of the data": ("torch_dist", r"open .*__0_\d+\.distcp", None),
    "the table of contents, one rank": ("torch_dist", r"open .*/\.metadata", 1),
    "the manifest": ("torch_dist", r"open .*manifest\.json", None),
    "the last file, in the background": ("torch_dist in the background", r"open .*/metadata\.json", None),
    "the new name": ("torch_dist", r"os\.rename .*/iter_0000002\.tmp", None),
    "the tracker, in the background": ("torch_dist in the background", r"os\.rename .*latest_checkpointed", None),
}
"""What is about to happen: (habit, operation, the rank that lives on)."""


@pytest.mark.parametrize("instant", INSTANTS)
def test_death_before(instant: str, tmp_path: Path, nursery: Nursery) -> None:
    name, operation, survivor = INSTANTS[instant]
    habit = replace(HABITS[name], die_before=operation, survivor=survivor)
    folder = tmp_path / "saved"
    assert nursery.run_and_wait(habit, folder) == 1, "it lived until the next checkpoint was the latest"
    assert any(folder.glob("iter_0000002*")), "it died before it wrote anything"
    check_what_is_left(habit, folder, 1, reference_of(habit.plan, 3))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in HABITS if HABITS[name].limit is None])
def test_death_before_every_operation(name: str, tmp_path: Path, nursery: Nursery) -> None:
    records: list[Record] = []
    size = HABITS[name].plan.size
    for survivor in (None, 1) if size > 1 else (None,):
        for number in range(1, 100):
            habit = replace(HABITS[name], die_before="", die_at=number, survivor=survivor)
            folder = tmp_path / f"{survivor}-{number}"
            latest = nursery.run_and_wait(habit, folder)
            check_what_is_left(habit, folder, latest, reference_of(habit.plan, 4))
            victims = [rank for rank in range(size) if rank != survivor]
            records.append({"killed": victims, "of": size, "before operation": number, "iteration": latest})
            shutil.rmtree(folder)
            if latest == 2:  # it was the latest already, or no operation was left
                break
        assert {record["iteration"] for record in records} == {1, 2}
    keep(f"{name}, before each operation", records)


# ---- at random instants ----


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
        check_what_is_left(habit, folder, latest, reference)
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


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", HABITS)
def test_many_kills_at_random_instants(tmp_path: Path, nursery: Nursery, name: str) -> None:
    folder = tmp_path / "saved"
    keep(name, crash(nursery, HABITS[name], folder, rounds=20, seed=100 + len(name), most_steps=600))


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
