"""The base install trains: with torch, numpy and what they require, no other package is missed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.functional_tests.program import ROOT, TINY, train_rows

WITHOUT = """
import runpy, sys

absent = set(sys.argv.pop(1).split(","))

class Filter:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Filter(finder) for finder in sys.meta_path]
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program as if some packages were not installed."""


def closure(names: list[str]) -> set[str]:
    """These distributions and all that they require here."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        requirements = [Requirement(text) for text in metadata.requires(name) or []]
        waiting += [each.name for each in requirements if each.marker is None or each.marker.evaluate()]
    return found


def modules_outside(distributions: set[str]) -> set[str]:
    """Top-level modules of this environment that none of the distributions provides."""
    providers = metadata.packages_distributions()
    kept = {"megatron", "tests", "pip", "setuptools", "_distutils_hack", "pkg_resources"}
    normalized = {
        module: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} for module, owners in providers.items()
    }
    return {module for module, owners in normalized.items() if not owners & distributions} - kept


def test_trains_saves_and_resumes_with_torch_and_numpy_only(tmp_path: Path) -> None:
    absent = modules_outside(closure(["torch", "numpy"]))
    assert {"tokenizers", "transformers", "tensorboard", "yaml", "rich", "pytest"} <= absent
    places = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2", "--train-iters", "4"]
    for stop in (["--exit-interval", "2"], []):
        command = ["pretrain_gpt.py", *TINY, *places, *stop]
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT, ",".join(sorted(absent)), *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert [row["iteration"] for row in train_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
