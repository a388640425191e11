"""How this process holds on to host memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names and numbers of mallopt(3)


def keep_freed_memory() -> bool:
    """Keep freed host memory for the next tensor instead of giving it back to the system; whether this is possible.

    A large block is otherwise a fresh mapping each time, whose pages the kernel zeroes one by one when they are first
    touched: a tenth of a training step on a CPU. The price is that the process stays as large as it once was. Process
    wide, glibc only; to be called before the first large allocation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
