"""tools/build_dataset_cache.py killed at any moment leaves no index or a whole one, and the next run completes them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.training.global_vars import destroy_global_vars
from tests.functional_tests.program import TINY
from tests.unit_tests.datasets.data_files import random_documents, write_dataset
from tools import build_dataset_cache

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


def command_line(prefixes: list[str], cache: Path) -> list[str]:
    """Flags of a blend."""
    blend = [word for i, prefix in enumerate(prefixes, 1) for word in (str(i), prefix)]
    words = [word for word in TINY if word != "--mock-data"]
    more = "--vocab-size 99 --global-batch-size 12 --micro-batch-size 4 --num-layers 1 --train-samples 64".split()
    return [*words, *more, "--data-path", *blend, "--data-cache-path", str(cache)]


def published(cache: Path) -> dict[str, bytes]:
    """All files that are there under their final names."""
    return {path.name: path.read_bytes() for path in cache.glob("*") if not path.name.startswith(".")}


def require_sound(cache: Path, expected: dict[str, bytes]) -> int:
    """Each file is what a run that is left alone writes, each index that has its description is whole.

    Returns the number of such indices.
    """
    found = published(cache)
    assert all(expected[name] == content for name, content in found.items())
    described = [name.removesuffix("description.txt") for name in found if name.endswith("-description.txt")]
    for stem in described:
        assert {name for name in expected if name.startswith(stem)} <= found.keys()
    return len(described)


# -- at each step ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process; nothing after it changes the disk."""


@contextmanager
def killed_before_replacement(number: int) -> Iterator[list[str]]:
    """Everything ends before the `number`-th file is given its name; the names given before."""
    given: list[str] = []
    replace, unlink = os.replace, Path.unlink

    def counting(source: str, target: str) -> None:
        if len(given) == number:
            Path.unlink = lambda self, missing_ok=False: None  # a killed process tidies nothing up
            raise Killed
        given.append(str(target))
        replace(source, target)

    os.replace = counting
    try:
        yield given
    except Killed:
        pass
    finally:
        os.replace, Path.unlink = replace, unlink


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch):
    """Runs the tool in this process."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # restored afterwards, whatever the tool sets

    def call(flags: list[str]) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(sys, "argv", ["build_dataset_cache.py", *flags])
        try:
            build_dataset_cache.main()
        finally:
            destroy_global_vars()

    yield call
    destroy_global_vars()


def test_killed_before_every_other_file_gets_its_name(tmp_path: Path, build, capsys: pytest.CaptureFixture) -> None:
    prefixes = [write_dataset(tmp_path / name, random_documents(60, seed=i)) for i, name in enumerate("ab")]
    with killed_before_replacement(10**9) as names:
        build(command_line(prefixes, tmp_path / "whole"))
    expected = published(tmp_path / "whole")
    assert len(names) == len(expected) and len(expected) >= 12
    for number in range(1, len(names), 2):
        fresh = tmp_path / f"killed before {number}"
        with killed_before_replacement(number) as given:
            build(command_line(prefixes, fresh))
        assert len(given) == number
        require_sound(fresh, expected)
        if number % 4 == 3:
            build(command_line(prefixes, fresh))
            assert published(fresh) == expected
    capsys.readouterr()


# -- at random moments -----------------------------------------------------------------------------------


def start(flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools/build_dataset_cache.py"), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def sweep(folder: Path, seed: int = 0) -> Iterator[dict[str, object]]:
    """A row for each of KILLS runs; half are killed at any moment of a run, half once some number of files is there."""
    prefixes = [write_dataset(folder / f"part{i}", random_documents(60, seed=i)) for i in range(8)]
    begin = time.monotonic()
    assert start(command_line(prefixes, folder / "whole")).wait() == 0
    duration = time.monotonic() - begin
    expected = published(folder / "whole")
    rng = random.Random(seed)
    for kill in range(KILLS):
        cache = folder / f"killed {kill}"
        at_any_moment = kill % 2 == 0
        begin = time.monotonic()
        process = start(command_line(prefixes, cache))
        if at_any_moment:
            time.sleep(rng.uniform(0, duration))
        else:
            num_files = rng.randrange(1, len(expected))
            while process.poll() is None and sum(1 for _ in cache.glob("[!.]*")) < num_files:
                time.sleep(0.001)
        process.kill()
        process.wait()
        elapsed = time.monotonic() - begin
        whole = require_sound(cache, expected)
        files = len(published(cache))
        again = start(command_line(prefixes, cache))
        assert again.wait() == 0 and published(cache) == expected
        yield {
            "killed_after_s": round(elapsed, 3),
            "aimed_at": "the whole run" if at_any_moment else "writing",
            "files": files,
            "of_files": len(expected),
            "whole_indices": whole,
            "run_again": "identical bytes",
        }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments(tmp_path: Path) -> None:
    rows = list(sweep(tmp_path))
    assert len(rows) == KILLS
    assert any(0 < row["files"] < row["of_files"] for row in rows)  # else it has tested nothing


def main() -> None:
    """Write the table of one sweep to the file named, a row a line, each when it is known."""
    with tempfile.TemporaryDirectory() as folder, open(sys.argv[1], "w", encoding="utf-8") as table:
        for row in sweep(Path(folder)):
            print(json.dumps(row), file=table, flush=True)


if __name__ == "__main__":
    main()
