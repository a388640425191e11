"""Checkpoints without a layout: state is saved under global names and loads into any other layout.

Reading and writing are imported when they are first used: models and optimizers only describe their state,
and torch's distributed checkpoint takes long to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core import check_is_distributed_checkpoint
from .mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

if TYPE_CHECKING:
    from .serialization import (
        load,
        load_common_state_dict,
        load_content_metadata,
        load_plain_tensors,
        load_tensors_metadata,
        remove_sharded_tensors,
        save,
    )

__all__ = [
    "LocalNonpersistentObject",
    "ShardedObject",
    "ShardedTensor",
    "check_is_distributed_checkpoint",
    "load",
    "load_common_state_dict",
    "load_content_metadata",
    "load_plain_tensors",
    "load_tensors_metadata",
    "remove_sharded_tensors",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.serialization"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
