"""Further copies of the model behind one server.

Rank 0 has the HTTP side, the engine of its own copy, and a `RemoteLoop` for each other one, whose first rank runs an
`Answering`. The copies' passes do not wait for each other.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import socket
import sys
import threading
from collections.abc import Sequence

import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import get_pg_rank, get_pg_size
from megatron.inference.serving.loop import FAILED, STOPPED, EngineGone, EngineLoop, Listener, Overloaded, Progress
from megatron.inference.serving.wire import Heard, Message, Wire, added, message_of, params_of
from megatron.training.failure.start import CONNECT_SECONDS, listen_to_ranks

PATIENCE_SECONDS = 5.0
"""How long a copy may take to tell its numbers."""


class Answering:
    """On the first rank of a copy other than rank 0's: hands its loop what rank 0 sends, and sends back what it gives.

    A connection that closes before rank 0 has said that it stops makes the loop fail.
    """

    def __init__(self, loop: EngineLoop, wire: Wire) -> None:
        self.loop, self.wire = loop, wire
        loop.max_waiting = sys.maxsize  # rank 0 has refused what are too many
        threading.Thread(target=self._run, name="replica: hears", daemon=True).start()

    def _run(self) -> None:
        try:
            for message in self.wire.messages():
                if message["do"] == "stop":
                    self.loop.stop()
                    return
                self._take(message)
        except EngineGone:  # the loop says why
            return
        finally:
            self.loop.fail("Connection closed by rank 0")  # nothing after a stop
            self.wire.close()

    def _take(self, message: Message) -> None:
        if message["do"] == "add":
            self._add(message["number"], message["tokens"], params_of(message))
        elif message["do"] == "cancel":
            self.loop.cancel(message["number"])
        else:
            self.wire.send({"of": None, "samples": self.loop.samples()[0]})

    def _add(self, number: int, tokens: list[int], params: SamplingParams) -> None:
        sent = 0

        def hear(item: Progress | BaseException) -> None:
            nonlocal sent
            if isinstance(item, Progress):  # rank 0 knows of ends
                running = {"running": len(self.loop.engine.context.sequences)}
                self.wire.send(message_of(number, item, sent) | running)
                sent = len(item.tokens)

        self.loop.submit(tokens, params, hear, number)


class RemoteLoop:
    """On rank 0: another copy's `EngineLoop`, as far as requests are concerned.

    Args:
        own: rank 0's loop, which fails if the connection is lost.
        name: of the copy, for messages.
    """

    def __init__(self, own: EngineLoop, wire: Wire, name: str) -> None:
        self.own, self.wire, self.name = own, wire, name
        self.gone: EngineGone | None = None
        self.rejected = 0
        self._last_words = FAILED
        self._requests: dict[int, Heard] = {}
        self._running = 0
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._samples: queue.SimpleQueue[dict[str, float]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"{name}: hears", daemon=True).start()

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def submit(self, tokens: Sequence[int], params: SamplingParams, listener: Listener, number: int) -> int:
        """As `EngineLoop.submit`."""
        self.own.engine.check_prompt(tokens, params.num_tokens_to_generate)
        with self._lock:
            if self.gone is not None:
                raise self.gone
            if self.load - self._running >= self.own.max_waiting:
                self.rejected += 1
                raise Overloaded(f"{self.own.max_waiting} requests wait already")
            self._requests[number] = Heard(number, tokens, params, listener)
        self.wire.send(added(number, tokens, params))
        return number

    def cancel(self, number: int) -> None:
        """As `EngineLoop.cancel`."""
        self.wire.send({"do": "cancel", "number": number})

    def stop(self) -> None:
        """As `EngineLoop.stop`."""
        self._last_words = STOPPED
        self.wire.send({"do": "stop"})

    def samples(self) -> list[dict[str, float]]:
        """As `EngineLoop.samples`.

        Raises:
            EngineGone: the copy does not tell any more.
        """
        with self._asking:
            if self.gone is not None:
                raise self.gone
            while not self._samples.empty():  # of one that came too late
                self._samples.get_nowait()
            self.wire.send({"do": "samples"})
            try:
                return [self._samples.get(timeout=PATIENCE_SECONDS) | {"requests_rejected_total": self.rejected}]
            except queue.Empty:
                raise EngineGone(f"{self.name} does not answer") from None

    def end(self, words: str) -> None:
        """As `EngineLoop.end`."""
        with self._lock:
            self.gone = self.gone or EngineGone(words)
            requests, self._requests = list(self._requests.values()), {}
        for heard in requests:
            heard.listener(self.gone)
        self.wire.close()

    def _run(self) -> None:
        for message in self.wire.messages():
            if message["of"] is None:
                self._samples.put(message["samples"])
            else:
                self._hear(message)
        self.end(self._last_words)
        self.own.fail(f"Connection closed by {self.name}")

    def _hear(self, message: Message) -> None:
        with self._lock:
            self._running = message["running"]
            is_last = message["end"] is not None
            heard = (self._requests.pop if is_last else self._requests.get)(message["of"], None)
        if heard is not None:
            heard.listener(heard.take(message))


class Replicas:
    """All copies of the model, as routes know an `EngineLoop`; each request goes to the one that has the fewest.

    What a request gives does not depend on the copy: seeds follow its number, which is counted here.
    """

    def __init__(self, own: EngineLoop, others: Sequence[RemoteLoop]) -> None:
        self.loops: list[EngineLoop | RemoteLoop] = [own, *others]
        self.engine = own.engine
        self._owners: dict[int, EngineLoop | RemoteLoop] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @property
    def gone(self) -> EngineGone | None:
        """What clients are told once one of the copies has stopped."""
        return next((loop.gone for loop in self.loops if loop.gone is not None), None)

    def loads(self) -> list[int]:
        """Requests that wait or run, for each copy."""
        return [loop.load for loop in self.loops]

    def submit(self, tokens: Sequence[int], params: SamplingParams, listener: Listener) -> int:
        """As `EngineLoop.submit`."""
        if self.gone is not None:
            raise self.gone

        def hear(item: Progress | BaseException) -> None:
            if not isinstance(item, Progress) or item.reason is not None:
                self._owners.pop(number, None)
            listener(item)

        with self._lock:
            loop, number = min(self.loops, key=lambda one: one.load), next(self._numbers)
            self._owners[number] = loop
            try:
                return loop.submit(tokens, params, hear, number)
            except BaseException:
                self._owners.pop(number, None)
                raise

    def cancel(self, number: int) -> None:
        """As `EngineLoop.cancel`."""
        loop = self._owners.get(number)
        if loop is not None:
            loop.cancel(number)

    def stop(self) -> None:
        """As `EngineLoop.stop`, for all copies."""
        for loop in self.loops:
            loop.stop()

    def end(self, words: str) -> None:
        """As `EngineLoop.end`, for all copies."""
        for loop in self.loops:
            loop.end(words)

    def samples(self) -> list[dict[str, float]]:
        """For each copy its numbers."""
        return [samples for loop in self.loops for samples in loop.samples()]


Front = EngineLoop | Replicas


def join_replicas(loop: EngineLoop) -> Front:
    """On rank 0 all copies, elsewhere the loop itself, which then hears from rank 0. Communicates: a broadcast over all
    ranks, and the first rank of each copy connects to rank 0.
    """
    group = parallel_state.get_data_parallel_group()
    if get_pg_size(group) == 1:
        return loop
    rank, count = dist.get_rank(), get_pg_size(group)
    address: list[tuple[str, int, str] | None] = [None]
    if rank == 0:
        server, token = listen_to_ranks(), secrets.token_hex(16)
        address = [(*server.getsockname()[:2], token)]
    dist.broadcast_object_list(address, src=0)
    assert address[0] is not None
    host, port, token = address[0]
    if rank == 0:
        with server:
            return Replicas(loop, [RemoteLoop(loop, *each) for each in _arrivals(server, token, count - 1)])
    if get_pg_rank(parallel_state.get_model_parallel_group()) == 0:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        connection.settimeout(None)
        wire = Wire(connection)
        wire.send({"token": token, "replica": get_pg_rank(group), "rank": rank})
        Answering(loop, wire)
    return loop


def _arrivals(server: socket.socket, token: str, count: int) -> list[tuple[Wire, str]]:
    """The connections of the other copies in their order, each with its name; others' are not taken."""
    found: dict[int, tuple[Wire, str]] = {}
    while len(found) < count:
        connection, _ = server.accept()
        connection.settimeout(CONNECT_SECONDS)
        wire = Wire(connection)
        hello = wire.hello()
        connection.settimeout(None)
        if not secrets.compare_digest(str(hello.get("token", "")).encode(), token.encode()):
            wire.close()
            connection.shutdown(socket.SHUT_RD)
            continue
        found[hello["replica"]] = wire, f"replica {hello['replica']} (rank {hello['rank']})"
    return [found[number] for number in sorted(found)]
