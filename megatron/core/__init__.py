"""Composable building blocks for training transformers at scale.

What is listed here is imported when it is first used: a program that prepares data does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron.core.package_info import __version__

if TYPE_CHECKING:
    from megatron.core import (
        dist_checkpointing,
        num_microbatches_calculator,
        parallel_state,
        tensor_parallel,
    )
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.timers import Timers

_MODULES = {
    "dist_checkpointing": "dist_checkpointing",
    "mpu": "parallel_state",
    "num_microbatches_calculator": "num_microbatches_calculator",
    "parallel_state": "parallel_state",
    "tensor_parallel": "tensor_parallel",
}
_HOMES = {
    "DistributedDataParallel": "distributed",
    "ModelParallelConfig": "model_parallel_config",
    "Timers": "timers",
}

__all__ = [
    "DistributedDataParallel",
    "ModelParallelConfig",
    "Timers",
    "__version__",
    "dist_checkpointing",
    "mpu",
    "num_microbatches_calculator",
    "parallel_state",
    "tensor_parallel",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
