"""An engine that many threads hand requests to, on all ranks of a model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.activity import communicating
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceRequest, FinishReason, Status
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import get_pg_rank, get_pg_size


class Overloaded(Exception):
    """Too many requests wait already: try again later."""


class EngineGone(Exception):
    """The engine has stopped: no request will be answered any more. The message is for clients."""


FAILED = "the model has stopped working; the server's log says why"
STOPPED = "the server is being stopped"


Best = list[list[tuple[int, float]]]
"""For each token the likeliest ones in its place: (token, log-probability)."""


@dataclass(frozen=True)
class PromptTold:
    """What was asked of a prompt's tokens but the first; empty where nothing was."""

    log_probs: list[float] = field(default_factory=list)
    best: Best = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What a pass gave for a request."""

    tokens: tuple[int, ...]
    """All generated tokens."""
    request: DynamicInferenceRequest
    """Read it only when `reason` is given: until then the engine goes on writing to it."""
    reason: FinishReason | None
    log_probs: tuple[float, ...] | None = None
    best: tuple[list[tuple[int, float]], ...] | None = None
    prompt: PromptTold = field(default_factory=PromptTold)
    """Complete from the first token on."""


Listener = Callable[[Progress | BaseException], None]


@dataclass(frozen=True)
class _Add:
    request_id: int
    tokens: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class _Cancel:
    request_id: int


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass(frozen=True)
class _Fail:
    why: str


Command = _Add | _Cancel | _Stop | _Fail


@dataclass
class Counters:
    """Since the start; for /metrics."""

    requests: int = 0
    completed: int = 0
    cancelled: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    passes: int = 0
    busy_seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)


class EngineLoop:
    """`run` on every rank of the model, in the main thread; `submit` and `cancel` on its first rank, from any thread.

    What was submitted since the last pass is broadcast from the first rank before each pass, so that all ranks do the
    same. The group is silent for at most `heartbeat` seconds, far below any timeout of it.

    Args:
        max_waiting: requests that wait, at most; more are refused.
    """

    def __init__(self, engine: DynamicInferenceEngine, max_waiting: int = 256, heartbeat: float = 5.0) -> None:
        self.engine, self.max_waiting, self.heartbeat = engine, max_waiting, heartbeat
        self.counters = Counters()
        self.gone: EngineGone | None = None
        """What clients are told from the end of the loop on."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._arrivals: dict[int, float] = {}
        self._lock = threading.Lock()
        self._next_id = 0
        self.group = parallel_state.get_model_parallel_group()
        engine.listeners.append(self._tell)

    # --- the first rank, any thread ------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._listeners)

    def loads(self) -> list[int]:
        """The same, of the one copy of the model that this is."""
        return [self.load]

    def submit(
        self, tokens: Sequence[int], params: SamplingParams, listener: Listener, number: int | None = None
    ) -> int:
        """The number of a new request, of which `listener` hears after each pass, in the engine's thread.

        Args:
            number: None is the next one.

        Raises:
            Overloaded: `max_waiting` requests wait.
            EngineGone: the loop has ended.
            ValueError, MaxSequenceLengthOverflowError: as `DynamicInferenceEngine.add_request`.
        """
        self.engine.check_prompt(tokens, params.num_tokens_to_generate)
        with self._lock:
            if self.gone is not None:
                raise self.gone
            if self.load - len(self.engine.context.sequences) >= self.max_waiting:
                self.counters.rejected += 1
                raise Overloaded(f"{self.max_waiting} requests wait already")
            if number is None:
                number, self._next_id = self._next_id, self._next_id + 1
            self._listeners[number] = listener
            self._arrivals[number] = time.monotonic()
            self.counters.requests += 1
            self.counters.prompt_tokens += len(tokens)
        self._commands.put(_Add(number, list(tokens), params))
        return number

    def cancel(self, request_id: int) -> None:
        """A request is not wanted any more; its listener hears of that."""
        self._commands.put(_Cancel(request_id))

    def stop(self) -> None:
        """End `run` on all ranks after the pass that runs."""
        self._commands.put(_Stop())

    def fail(self, why: str) -> None:
        """End `run` on all ranks with a ConnectionError, unless it has been stopped."""
        self._commands.put(_Fail(why))

    def samples(self) -> list[dict[str, float]]:
        """Numbers for /metrics, of the one copy of the model that this is."""
        counters, context = self.counters, self.engine.context
        waits = sorted(counters.first_token_seconds)
        return [
            {
                "requests_total": counters.requests,
                "requests_completed_total": counters.completed,
                "requests_cancelled_total": counters.cancelled,
                "requests_rejected_total": counters.rejected,
                "prompt_tokens_total": counters.prompt_tokens,
                "generated_tokens_total": counters.generated_tokens,
                "passes_total": counters.passes,
                "busy_seconds_total": counters.busy_seconds,
                "requests_running": len(context.sequences),
                "requests_waiting": len(self.engine.waiting),
                **context.chunk_counts(),
                "first_token_seconds_median": waits[len(waits) // 2] if waits else 0,
            }
        ]

    # --- all ranks, the main thread ------------------------------------------------------------------------

    def run(self) -> None:
        """Pass after pass, until `stop`. That something goes wrong is told to all listeners; what, is raised."""
        try:
            while self._apply(self._exchange()):
                if self.engine.has_unfinished_requests():
                    begin = time.perf_counter()
                    self.engine.step()
                    self.counters.passes += 1
                    self.counters.busy_seconds += time.perf_counter() - begin
            self.end(STOPPED)
        except BaseException:
            self.end(FAILED)
            raise

    def end(self, words: str) -> None:
        """Tell all listeners, and those who come later, that there will be no answer; from any thread."""
        with self._lock:
            self.gone = self.gone or EngineGone(words)
            listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener(self.gone)

    def _exchange(self) -> list[Command]:
        """What came in since the last pass, the same on all ranks. Communicates: a broadcast of objects."""
        commands = self._drain() if get_pg_rank(self.group) == 0 else []
        if get_pg_size(self.group) == 1:
            return commands
        shared: list[Any] = [commands]
        with communicating("broadcast", self.group, peer=0, of="requests"):
            torch.distributed.broadcast_object_list(shared, group=self.group, group_src=0)
        return shared[0]

    def _drain(self) -> list[Command]:
        """All commands there are; if there is nothing to do, wait for one."""
        commands: list[Command] = []
        try:
            if not self.engine.has_unfinished_requests():
                commands.append(self._commands.get(timeout=self.heartbeat))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def _apply(self, commands: list[Command]) -> bool:
        """Whether to go on."""
        for command in commands:
            match command:
                case _Add(number, tokens, params):
                    self.engine.add_request(number, tokens, sampling_params=params)
                case _Cancel(number):
                    self.engine.cancel(number)
                case _Stop():
                    return False
                case _Fail(why):
                    raise ConnectionError(why)
        return True

    def _tell(self, request: DynamicInferenceRequest) -> None:
        listener = self._listeners.get(request.request_id)
        if listener is None:
            return
        done = request.status is Status.COMPLETED
        arrival = self._arrivals.pop(request.request_id, None)
        if arrival is not None and request.generated_tokens:
            self.counters.first_token_seconds = [*self.counters.first_token_seconds[-999:], time.monotonic() - arrival]
        if done:
            self._finish(request)
        log_probs, best = request.generated_log_probs, request.generated_top_n_token_logprobs
        listener(
            Progress(
                tuple(request.generated_tokens),
                request,
                request.finish_reason,
                None if log_probs is None else tuple(log_probs),
                None if best is None else tuple(best),
                PromptTold(request.prompt_log_probs or [], request.prompt_top_n_token_logprobs or []),
            )
        )

    def _finish(self, request: DynamicInferenceRequest) -> None:
        with self._lock:
            self._listeners.pop(request.request_id, None)
        self._arrivals.pop(request.request_id, None)
        self.counters.generated_tokens += len(request.generated_tokens)
        if request.finish_reason is FinishReason.CANCELLED:
            self.counters.cancelled += 1
        else:
            self.counters.completed += 1
