"""Which errors are the user's to mend: they are shown without a traceback."""

from __future__ import annotations

from megatron.training.nan_check import NonFiniteLoss


def is_users_error(error: BaseException) -> bool:
    """Whether the message alone says what is wrong: bad values, missing files, unbuilt options, a loss gone wrong."""
    return isinstance(error, (ValueError, FileNotFoundError, PermissionError, NotImplementedError, NonFiniteLoss))
