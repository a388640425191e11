"""The application around the library: flags, training loop, checkpoints, logging.

The names below are imported when they are first used: a program that only needs the flags does not load the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.training.global_vars import (
        get_args,
        get_signal_handler,
        get_tensorboard_writer,
        get_timers,
        get_tokenizer,
        get_wandb_writer,
    )
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model, get_train_valid_test_num_samples, pretrain
    from megatron.training.utils import is_last_rank, print_rank_0, print_rank_last

_HOMES = {
    "get_args": "global_vars",
    "get_model": "training",
    "get_signal_handler": "global_vars",
    "get_tensorboard_writer": "global_vars",
    "get_timers": "global_vars",
    "get_tokenizer": "global_vars",
    "get_train_valid_test_num_samples": "training",
    "get_wandb_writer": "global_vars",
    "initialize_megatron": "initialize",
    "is_last_rank": "utils",
    "pretrain": "training",
    "print_rank_0": "utils",
    "print_rank_last": "utils",
}

__all__ = [
    "get_args",
    "get_model",
    "get_signal_handler",
    "get_tensorboard_writer",
    "get_timers",
    "get_tokenizer",
    "get_train_valid_test_num_samples",
    "get_wandb_writer",
    "initialize_megatron",
    "is_last_rank",
    "pretrain",
    "print_rank_0",
    "print_rank_last",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
