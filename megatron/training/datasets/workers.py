"""Tokenizing in several processes, in order."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

from megatron.training.datasets.encoding import DocumentEncoder, EncodedBlock
from megatron.training.datasets.input_files import Block

_PR_SET_PDEATHSIG = 1
_BLOCKS_IN_FLIGHT = 3  # per worker: enough to keep it busy, few enough to bound memory


def encode_in_order(
    encoder: DocumentEncoder, blocks: Iterator[Block], workers: int
) -> Iterator[tuple[Block, EncodedBlock]]:
    """The blocks and what became of them, in their order, made by `workers` processes (1: by this one)."""
    if workers == 1:
        for block in blocks:
            yield block, encoder.encode(block)
        return
    # fork: a worker starts at once with the tokenizer that is loaded already
    encoder.load()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder, os.getpid()))
    try:
        first = itertools.islice(blocks, workers * _BLOCKS_IN_FLIGHT)
        pending = deque((block, pool.submit(_encode_here, block)) for block in first)
        while pending:
            block, encoded = pending.popleft()
            yield block, encoded.result()
            for block in itertools.islice(blocks, 1):
                pending.append((block, pool.submit(_encode_here, block)))
    except BrokenProcessPool:
        raise RuntimeError("a worker process died, perhaps for want of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: DocumentEncoder | None = None


def _start_worker(encoder: DocumentEncoder, parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _die_with_parent()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _die_with_parent() -> None:
    """Ask Linux to kill this process as soon as its parent ends: it holds the lock on the parent's output."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent(parent: int) -> None:
    """The same for other systems, and for a parent that ended before it was asked."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # a killed parent cannot tell its workers to end


def _encode_here(block: Block) -> EncodedBlock:
    assert _worker_encoder is not None
    return _worker_encoder.encode(block)
