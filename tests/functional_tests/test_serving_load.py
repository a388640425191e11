"""64 clients for two minutes: no error, nothing held, memory bounded, nobody left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.program import ROOT

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_many_clients_for_two_minutes(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    subprocess.run([sys.executable, "benchmarks/serve_load.py", "--output", str(output)], cwd=ROOT, check=True)
    found = json.loads(output.read_text())["load"]
    assert found["errors"] == [] and found["chunks_held_at_the_end"] == 0 and found["exit_code"] == 0
    memory = found["server_memory_mib"]
    assert memory["end"] < memory["half"] + 50
    per_client = found["finished_per_client"]
    assert per_client["most"] <= 2 * per_client["least"]
