"""Which requests make up the next static batch."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from torch import Tensor

from megatron.core.inference.async_stream import AsyncStream
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.sampling_params import SamplingParams

Pool = OrderedDict[str, InferenceRequest]


class Scheduler:
    """Requests in the order of their arrival: at most `max_batch_size` are active, the others wait."""

    def __init__(self, max_batch_size: int | None) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size ({max_batch_size}) must be positive")
        self.max_batch_size = max_batch_size
        self.active_request_pool: Pool = OrderedDict()
        self.waiting_request_pool: Pool = OrderedDict()
        self.completed_request_pool: Pool = OrderedDict()
        self.streams: OrderedDict[str, AsyncStream] = OrderedDict()
        self._counter = 0

    def get_new_request_id(self) -> str:
        """The next number, as text."""
        self._counter += 1
        return str(self._counter - 1)

    def add_request(
        self,
        prompt: str | None = None,
        prompt_tokens: list[int] | Tensor | None = None,
        encoder_prompt: str | None = None,
        sampling_params: SamplingParams | None = None,
        arrival_time: float | None = None,
        streaming: bool = False,
        inference_request: InferenceRequest | None = None,
        *,
        inference_parameters: SamplingParams | None = None,
    ) -> str:
        """The number of a new request.

        Args:
            prompt, prompt_tokens: both, unless `inference_request` is given, which says all.
            arrival_time: seconds since the epoch; None is now.
            streaming: keep an `AsyncStream` of its results; needs a running event loop.
            inference_parameters: the former name of `sampling_params`.
        """
        if inference_request is None:
            if prompt is None or prompt_tokens is None:
                raise ValueError("a request needs a prompt and its tokens")
            tokens = prompt_tokens.tolist() if isinstance(prompt_tokens, Tensor) else list(prompt_tokens)
            inference_request = InferenceRequest(
                request_id=self.get_new_request_id(),
                prompt=prompt,
                prompt_tokens=tokens,
                sampling_params=sampling_params or inference_parameters or SamplingParams(),
                arrival_time=time.time() if arrival_time is None else arrival_time,
                encoder_prompt=encoder_prompt,
            )
        inference_request.status = Status.WAITING_IN_QUEUE
        if streaming:
            self.streams[inference_request.request_id] = AsyncStream(inference_request.request_id, self.abort_request)
        self.waiting_request_pool[inference_request.request_id] = inference_request
        self._fill()
        return inference_request.request_id

    def _fill(self) -> None:
        while self.waiting_request_pool and (
            self.max_batch_size is None or len(self.active_request_pool) < self.max_batch_size
        ):
            self.add_earliest_waiting_request_to_active_pool()

    def add_earliest_waiting_request_to_active_pool(self) -> None:
        """The request that waited longest becomes active."""
        number, request = self.waiting_request_pool.popitem(last=False)
        request.status = Status.ACTIVE_BUT_NOT_GENERATING_TOKENS
        self.active_request_pool[number] = request

    def have_requests_pending(self) -> bool:
        """Some wait or are active."""
        return self.num_requests_pending() > 0

    def num_requests_pending(self) -> int:
        """How many wait or are active."""
        return len(self.active_request_pool) + len(self.waiting_request_pool)

    def update_requests_pools(self, result_dict: Pool | None = None) -> None:
        """Completed requests of `result_dict` leave the active ones, and those that wait take their places."""
        for number, request in (result_dict or {}).items():
            if request.status is Status.COMPLETED and number in self.active_request_pool:
                del self.active_request_pool[number]
                self.completed_request_pool[number] = request
        self._fill()

    def abort_request(self, request_id: str, *, exception: BaseException | type[BaseException] | None = None) -> None:
        """A request is not wanted any more; its stream ends, with `exception` if there is one."""
        self.waiting_request_pool.pop(request_id, None)
        self.active_request_pool.pop(request_id, None)
        stream: Any = self.streams.pop(request_id, None)
        if stream is not None:
            stream.finish(exception)
        self._fill()
