"""Saves that end later: what was asked for, and a queue that finishes them on all ranks together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron.core import device

from ..collective import raise_on_all_ranks, rank_and_size


class AsyncRequest(NamedTuple):
    """Something to do in the background, and what all ranks do together once it is done everywhere.

    `async_fn(*async_fn_args, **async_fn_kwargs)` runs on a thread and must not communicate between ranks; the
    `finalize_fns` run on the main thread of all ranks. `preload_fn()`, if given, makes the second argument just before.
    """

    async_fn: Callable[..., Any] | None
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], Any]]
    async_fn_kwargs: dict[str, Any] = {}
    preload_fn: Callable[[], Any] | None = None
    is_frozen: bool = False
    call_idx: int = 0

    def add_finalize_fn(self, fn: Callable[[], Any]) -> None:
        """Add something to do at the end, unless the request is under way already."""
        if self.is_frozen:
            raise RuntimeError("nothing can be added to a request that was scheduled")
        self.finalize_fns.append(fn)

    def run(self) -> None:
        """Do the background part here and now."""
        if self.async_fn is not None:
            args = list(self.async_fn_args)
            if self.preload_fn is not None:
                args[1] = self.preload_fn()
            self.async_fn(*args, **self.async_fn_kwargs)

    def execute_sync(self) -> None:
        """Do all of it here and now. All ranks call this; if one fails, all raise."""
        failure: Exception | None = None
        try:
            self.run()
        except Exception as error:
            failure = error
        raise_on_all_ranks(failure, "cannot save")
        for finalize in self.finalize_fns:
            finalize()

    def freeze(self) -> AsyncRequest:
        """The same request, to which nothing can be added."""
        return self._replace(is_frozen=True)


class _Call:
    """A request under way."""

    def __init__(self, request: AsyncRequest) -> None:
        self.request = request
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.request.run()
        except Exception as error:
            self.failure = error


class AsyncCallsQueue:
    """Requests under way, finished in the order in which they were scheduled.

    Args:
        persistent: accepted for compatibility: whether the process that writes is kept is up to what the requests run.
    """

    def __init__(self, persistent: bool = False) -> None:
        self.persistent = persistent
        self._calls: deque[_Call] = deque()
        self._count = 0

    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        """Start the background part; returns the number of the call."""
        self._count += 1
        request = async_request._replace(call_idx=self._count).freeze()
        self._calls.append(_Call(request))
        return self._count

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Finish the calls whose background part is done on all ranks; returns their numbers.

        All ranks call this, with the same arguments: it communicates while calls are under way.

        Args:
            blocking: wait for all calls.
            no_dist: look at this rank alone.

        Raises:
            CheckpointingException: a background part has failed; on all ranks, whichever it was. The call is dropped.
        """
        finished = []
        while self._calls:
            call = self._calls[0]
            if blocking:
                call.thread.join()
            if not _everywhere(not call.thread.is_alive(), no_dist or blocking):
                break
            self._calls.popleft()
            if no_dist and call.failure is not None:
                raise call.failure
            if not no_dist:
                raise_on_all_ranks(call.failure, "cannot save")
            for finalize in call.request.finalize_fns:
                finalize()
            finished.append(call.request.call_idx)
        return finished

    def get_num_unfinalized_calls(self) -> int:
        """Number of calls under way."""
        return len(self._calls)

    def close(self) -> None:
        """Finish everything. All ranks call this."""
        self.maybe_finalize_async_calls(blocking=True)


def _everywhere(done: bool, local: bool) -> bool:
    """Whether all ranks are done. Communicates one number."""
    if local or rank_and_size()[1] == 1:
        return done
    flag = torch.tensor(int(done), dtype=torch.int32, device=device.current_device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
