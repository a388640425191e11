"""A request's partial results, for whoever waits for them in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from megatron.core.inference.inference_request import InferenceRequest


class AsyncStream:
    """A queue that an engine fills, from the event loop's thread or another, and `generator` empties.

    Args:
        request_id: whose results.
        cancel: called with it when nobody waits any more.
    """

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self._request_id, self._cancel = request_id, cancel
        self._queue: asyncio.Queue[InferenceRequest | BaseException | type[BaseException] | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._finished = False

    def put(self, item: InferenceRequest | Exception) -> None:
        """The request as it is now; nothing happens after `finish`."""
        if not self._finished:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def finish(self, exception: BaseException | type[BaseException] | None = None) -> None:
        """Nothing more will come; `exception` is raised where the results are waited for."""
        if not self._finished:
            self._finished = True
            self._loop.call_soon_threadsafe(self._queue.put_nowait, exception)

    @property
    def finished(self) -> bool:
        return self._finished

    async def generator(self) -> AsyncGenerator[InferenceRequest, None]:
        """What was put, until `finish`. If it is closed before, the request is cancelled."""
        ended = False
        try:
            while True:
                item = await self._queue.get()
                if isinstance(item, BaseException) or (isinstance(item, type) and issubclass(item, BaseException)):
                    ended = True
                    raise item
                if item is None:
                    ended = True
                    return
                yield item
        finally:
            if not ended:
                self._cancel(self._request_id)
