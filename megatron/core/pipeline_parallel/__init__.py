"""Pipeline parallelism: schedules as data, one executor, the public door."""

from __future__ import annotations

from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

__all__ = ["get_forward_backward_func"]
