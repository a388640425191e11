"""Composable building blocks for training transformers at scale."""

from __future__ import annotations

from megatron.core import parallel_state

mpu = parallel_state

__all__ = ["mpu", "parallel_state"]
