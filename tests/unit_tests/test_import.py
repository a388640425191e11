"""What importing the library costs, and that the names it promises are there."""

from __future__ import annotations

import subprocess
import sys

import megatron.core

_MEASURE = """
import time
begin = time.process_time(); import torch; middle = time.process_time(); import megatron.core; end = time.process_time()
print(middle - begin, end - middle)
"""


def test_import_costs_little_more_than_torch() -> None:
    """0.3 s beyond torch are allowed; as a ratio (torch itself takes 1.5 s and more) that is a fifth of it."""
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    torch_seconds, core_seconds = map(float, done.stdout.split())
    assert core_seconds < 0.2 * torch_seconds


def test_promised_names_can_be_imported() -> None:
    for name in megatron.core.__all__:
        assert getattr(megatron.core, name) is not None
    assert megatron.core.mpu is megatron.core.parallel_state
