"""The terminal client's own part: lines that can be edited and recalled, also in a later session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty")
readline = pytest.importorskip("readline")
if "libedit" in (readline.__doc__ or ""):
    pytest.skip("libedit has keys and a file of its own", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
UP, LEFT, END = "\x1b[A", "\x1b[D", "\x1b[F"


def session(history: Path, keys: list[str]) -> str:
    """What the terminal shows when each of `keys` is typed after a question; nobody listens at the address."""
    import pty

    mine, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "tools/text_generation_cli.py"), "127.0.0.1:1", "--history", str(history)]
    terminal = {**os.environ, "TERM": "xterm", "INPUTRC": os.devnull}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal)
    os.close(theirs)
    shown = ""
    for line in keys:
        asked = shown.count("Enter ")
        while shown.count("Enter ") == asked:
            shown += os.read(mine, 4096).decode()
        os.write(mine, line.encode())
    try:
        while piece := os.read(mine, 4096):
            shown += piece.decode()
    except OSError:  # how a terminal says that its program has ended
        pass
    os.close(mine)
    assert process.wait() == 0
    return shown


def test_lines_can_be_edited_and_recalled_in_a_later_session(tmp_path: Path) -> None:
    history = tmp_path / "history"
    shown = session(history, ["Cal me\n", "x\n", "3\n", "\n"])
    assert "'x' is not a whole number" in shown and "127.0.0.1:1/api cannot be reached" in shown
    assert history.read_text().splitlines() == ["Cal me", "x", "3"]
    session(history, [UP * 3 + LEFT * 3 + "l" + END + " Ishmael\n", "3\n", "\n"])
    assert history.read_text().splitlines() == ["Cal me", "x", "3", "Call me Ishmael", "3"]
