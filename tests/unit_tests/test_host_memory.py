"""Freed memory stays with the process, by the C library's own books (page faults depend on where a block lands)."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
import torch
from megatron.core.host_memory import keep_freed_memory

class Books(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("impossible here")
mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo is None:
    sys.exit("no books here")
mallinfo.restype = Books
before = mallinfo()
tensor = torch.empty(64 << 20, dtype=torch.uint8)
held = mallinfo()
del tensor
print((held.hblkhd - before.hblkhd) >> 20, (mallinfo().arena - before.arena) >> 20)
"""


def megabytes_mapped_and_kept(how: str) -> tuple[int, int]:
    """What a tensor of 64 MiB took as a mapping of its own, and what the heap still holds once it is gone."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if run.returncode and "here" in run.stderr:
        pytest.skip(f"{run.stderr.strip()}: another C library than glibc >= 2.33")
    assert run.returncode == 0, run.stderr
    mapped, kept = map(int, run.stdout.split())
    return mapped, kept


def test_a_freed_tensor_stays_with_the_process() -> None:
    mapped, kept = megabytes_mapped_and_kept("default")
    if mapped < 64:
        pytest.skip("malloc is not glibc's, its books say nothing")
    assert kept < 32
    mapped, kept = megabytes_mapped_and_kept("keep")
    assert mapped == 0
    assert kept >= 32  # the heap may have had some room
