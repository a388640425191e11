"""Rank 0's ear for all ranks: a thread that hears who dies, fails or waits in vain, and tells all the one verdict."""

from __future__ import annotations

import hmac
import logging
import selectors
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from megatron.training.failure.clock import REAL, Clock
from megatron.training.failure.line_channel import LineChannel, tune
from megatron.training.failure.state import RankState
from megatron.training.failure.verdict import Member, Verdict, judge, named

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.3
"""After a death: others that died with it are counted in."""
COMPLAINT_SECONDS = 1.0
"""After a broken connection: a death that explains it would be known by then."""
ANSWER_SECONDS = 3.0
"""How long a rank may take to say what it is doing, or to print its traceback."""
LINGER_SECONDS = 3.0
"""How long rank 0 stays after the verdict, or after the end, for the others to hear it."""


@dataclass
class Hub:
    """The server of one run; `run` is its thread.

    A rank that closes its connection without a goodbye has died: a process cannot go without its kernel closing
    it. So a death is known at once and never guessed.
    """

    server: socket.socket
    token: str
    world_size: int
    clock: Clock = REAL
    members: dict[int, Member] = field(default_factory=dict)
    channels: dict[int, LineChannel] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    failures: dict[int, str] = field(default_factory=dict)
    """What ranks have said that went wrong with them."""
    states: dict[int, RankState] = field(default_factory=dict)
    complained: set[int] = field(default_factory=set)
    speaker: int | None = None
    """The rank that failed first and prints its traceback before the others hear of it."""
    verdict: Verdict | None = None
    _deadline: float | None = None
    _asked: bool = False
    _closing: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Serve until all ranks have left, or the verdict has been told."""
        selector = selectors.DefaultSelector()
        selector.register(self.server, selectors.EVENT_READ, None)
        try:
            while not self._is_over():
                wait = 0.5 if self._deadline is None else max(0.0, min(0.5, self._deadline - self.clock.now()))
                for key, _ in self.clock.select(selector, wait):
                    if key.data is None:
                        connection, _ = self.server.accept()
                        tune(connection)
                        selector.register(connection, selectors.EVENT_READ, LineChannel(connection))
                    else:
                        self._serve(key.data, selector)
                if self._deadline is not None and self.clock.now() >= self._deadline:
                    self._deadline = None
                    self._decide()
        except Exception:  # a fault of the watch must not end a run that goes well
            logger.exception("the failure watch has stopped")
            self._tell_all({"kind": "bye"})
        finally:
            selector.close()
            self.server.close()

    def close(self) -> None:
        """Stop serving soon, even if not all have said goodbye; those who have not are told."""
        self._closing.set()

    def forget_in_child(self) -> None:
        """Close what a forked process has inherited: it would keep connections open that this one closes."""
        self.server.close()
        for channel in self.channels.values():
            channel.close()

    def _is_over(self) -> bool:
        if self.verdict is not None or self._closing.is_set():
            if self._closing.is_set() and self.verdict is None:
                self._tell_all({"kind": "bye"})
            return True
        return len(self.left) == self.world_size

    # --- hearing ---

    def _serve(self, channel: LineChannel, selector: selectors.BaseSelector) -> None:
        messages, is_open = channel.receive()
        for message in messages:
            if channel.rank is None and not self._admit(channel, message):
                is_open = False
                break
            self._hear(channel.rank, message)
        if not is_open:
            selector.unregister(channel.connection)
            channel.close()
            if channel.rank is not None:
                self._lost(channel.rank)

    def _admit(self, channel: LineChannel, message: dict[str, Any]) -> bool:
        if message.get("kind") != "hello" or not hmac.compare_digest(str(message.get("token")), self.token):
            return False
        channel.rank = int(message["rank"])
        self.members[channel.rank] = Member(channel.rank, int(message["pid"]), str(message["host"]))
        self.channels[channel.rank] = channel
        return True

    def _hear(self, rank: int | None, message: dict[str, Any]) -> None:
        assert rank is not None
        if "state" in message:
            self.states[rank] = RankState.from_json(message["state"])
        match message["kind"]:
            case "bye":
                self.left.add(rank)
            case "failed":
                self._failed(rank, message["summary"])
            case "complaint":
                self.complained.add(rank)
                self._decide_within(COMPLAINT_SECONDS)
            case "told" if rank == self.speaker:
                self._blame_failure(rank)
            case "state" if self._asked and self._has_all_states():
                self._decide_within(0.0)

    def _failed(self, rank: int, summary: str) -> None:
        self.failures[rank] = summary
        if self.speaker is None and not self.dead:  # a death explains what else fails within moments of it
            self.speaker = rank
            self.channels[rank].send({"kind": "speak"})
            self._deadline = self.clock.now() + ANSWER_SECONDS

    def _lost(self, rank: int) -> None:
        del self.channels[rank]
        if rank == self.speaker:
            self._blame_failure(rank)
        elif rank not in self.left:
            self.dead.add(rank)
            self._decide_within(SETTLE_SECONDS)

    def _decide_within(self, seconds: float) -> None:
        deadline = self.clock.now() + seconds
        if self.speaker is None:
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    # --- deciding ---

    def _decide(self) -> None:
        if self.speaker is not None:
            self._blame_failure(self.speaker)
        elif self.dead:
            ranks = tuple(sorted(self.dead))
            self._announce(Verdict(ranks, f"{named(self.members, ranks)} died without a word: killed, or crashed"))
        elif not self._asked:
            self._asked = True
            self.states = {rank: state for rank, state in self.states.items() if rank in self.complained}
            self._tell_all({"kind": "report"}, but=self.complained)
            self._decide_within(0.0 if self._has_all_states() else ANSWER_SECONDS)
        else:
            left = frozenset(self.left)
            self._announce(judge(self.members, self.states, frozenset(self.complained), left))

    def _has_all_states(self) -> bool:
        return self.members.keys() <= self.states.keys() | self.left

    def _blame_failure(self, rank: int) -> None:
        self._announce(Verdict((rank,), f"{self.members[rank]} failed: {self.failures[rank]}"))

    def _announce(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._tell_all({"kind": "verdict", "ranks": list(verdict.ranks), "reason": verdict.reason})

    def _tell_all(self, message: dict[str, Any], but: Collection[int] = ()) -> None:
        for rank, channel in self.channels.items():
            if rank not in but:
                channel.send(message)

    def linger(self) -> None:
        """Wait until the others have closed their connections, for a while."""
        deadline = self.clock.now() + LINGER_SECONDS
        others = [channel for rank, channel in self.channels.items() if rank != 0]
        for channel in others:
            channel.wait_for_close(deadline - self.clock.now(), self.clock)
