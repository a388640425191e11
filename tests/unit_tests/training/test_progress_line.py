"""The live line of a terminal: rewritten in place, silent elsewhere."""

from __future__ import annotations

import os
import pty

import pytest

from megatron.training.logging.progress import ProgressLine


def test_silent_unless_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(True, 10)
    line.show(1, {"lm loss": 2.0}, 100)
    line.clear()
    assert capsys.readouterr().err == ""


def test_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        line = ProgressLine(True, 10)
        line.show(1, {"lm loss": 2.5}, 100)
        line.clear()
        shown = os.read(master, 1000).decode()
    os.close(master)
    assert shown.startswith("\r\x1b[K1/10 | lm loss 2.5000 |")
    assert shown.endswith("\r\x1b[K")
