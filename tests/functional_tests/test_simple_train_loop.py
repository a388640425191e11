"""A program written against the documented Python API trains, saves and loads, with two ranks on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.functional_tests.program import ROOT


def test_example_loop_learns_saves_and_loads(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, "examples/run_simple_mcore_train_loop.py", str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"step +\d+ +loss ([\d.]+)", result.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert "loaded back: the weights are equal" in result.stdout
