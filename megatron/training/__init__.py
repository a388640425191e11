"""The application around the library: flags, training loop, checkpoints, logging."""

from __future__ import annotations

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
