"""The loss curve: the last value of a repeated iteration, a picture, the numbers in words."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def plot_metrics(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/plot_metrics.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_draws_and_reports_the_end_of_a_resumed_run(tmp_path: Path) -> None:
    rows = [{"iteration": step, "lm loss": 9.0 - step} for step in (1, 2, 3, 2, 3)]
    rows.insert(3, {"iteration": 3, "lm loss validation": 8.5})
    rows.append({"iteration": 3, "lm loss validation": 6.25})
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 4, "lm l')
    result = plot_metrics("--metrics", metrics, "--output", picture, "--reference", 7.5)
    assert result.returncode == 0, result.stderr
    assert "validation loss: 6.2500 nats per token at iteration 3" in result.stdout
    assert "reference: 7.5000 nats per token" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_a_file_without_losses_says_what_it_has(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 1, "grad-norm": 2.0}\n')
    result = plot_metrics("--metrics", metrics, "--output", tmp_path / "loss.png")
    assert result.returncode != 0
    assert "no line has 'lm loss'; it has grad-norm, iteration" in result.stderr
