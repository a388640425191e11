"""What importing the library costs, and that the names it promises are there."""

from __future__ import annotations

import subprocess
import sys

import megatron.core

_COUNT = """
import sys
import torch
before = set(sys.modules)
import megatron.core
print(*sorted(set(sys.modules) - before))
"""


def test_import_costs_little_more_than_torch() -> None:
    """In modules: torch itself brings more than a thousand; parts of it that are imported late take seconds."""
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True)
    new = done.stdout.split()
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "sympy", "transformers"))]
    assert len(new) < 50


def test_promised_names_can_be_imported() -> None:
    for name in megatron.core.__all__:
        assert getattr(megatron.core, name) is not None
    assert megatron.core.mpu is megatron.core.parallel_state
