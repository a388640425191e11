"""How a program ends when something goes wrong on a rank."""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.failure.process import end_process
from megatron.training.failure.start import current_watch, stop_failure_watch
from megatron.training.nan_check import NonFiniteLoss

_USERS = (ValueError, OSError, NotImplementedError, NonFiniteLoss, CheckpointingException)


def is_users_error(error: BaseException) -> bool:
    """Whether the message alone says what is wrong: bad values, files, unbuilt options, a loss gone wrong."""
    return isinstance(error, _USERS)


@contextmanager
def exit_at_once_on_error() -> Iterator[None]:
    """End the process with exit code 1 on an exception, naming the rank; no traceback where the message says all.

    An orderly shutdown would wait for ranks that wait for this one. Where the failure watch runs, all ranks end,
    and one message says why. Inside a host program that has set torch.distributed up itself, exceptions are the
    host's and pass through.
    """
    if dist.is_initialized():
        yield
        return
    atexit.register(stop_failure_watch)  # a program that ends by itself has not died
    try:
        yield
    except Exception as error:
        watch = current_watch()
        if watch is not None:
            watch.note(error)
        text = f"{type(error).__name__}: {error}\n" if is_users_error(error) else traceback.format_exc()
        text = f"[rank {dist.get_rank()}] {text}" if dist.is_initialized() else text
        if watch is not None:
            watch.fail(error, text)
        end_process(1, text)
