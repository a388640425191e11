"""The memory report of a command that is not started."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megatron.training.config.flags import all_flags

TOOL = Path(__file__).resolve().parents[3] / "tools" / "report_theoretical_memory.py"
FLAGS = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 4 --recompute-activations --tensor-model-parallel-size 2 --sequence-parallel "
    "--tokenizer-type NullTokenizer --vocab-size 50256 --mock-data --train-iters 1 --lr 1e-3"
)


def run(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    all_flags()  # remembered from now on: a default among them is read from WORLD_SIZE
    monkeypatch.setattr(sys, "argv", [str(TOOL), *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    runpy.run_path(str(TOOL), run_name="__main__")


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(FLAGS, monkeypatch)
    printed = capsys.readouterr().out
    assert "Number of parameters in transformer block in billions: 0.30\n" in printed
    assert "Activation memory footprint per transformer layer: 68.0 MB\n" in printed
    assert printed.endswith("MB\n")


def test_settings_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="3"):
        run(FLAGS.replace("parallel-size 2", "parallel-size 3"), monkeypatch)
