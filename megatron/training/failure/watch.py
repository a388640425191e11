"""Beside every rank's main thread: hears the verdict of the hub, notices waits that take too long, ends the process."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from megatron.training.failure.clock import REAL, Clock
from megatron.training.failure.hub import Hub
from megatron.training.failure.line_channel import LineChannel, readable
from megatron.training.failure.process import ThisProcess
from megatron.training.failure.state import RankState
from megatron.training.failure.verdict import Member

PATIENCE_SECONDS = 6.0
"""How long a rank that lost a connection waits to hear why: longer than the hub takes to find out."""
SIGNAL_SECONDS = 1.5
"""How long after SIGTERM a verdict may still come: launchers send it because another rank has failed."""
POLL_SECONDS = 0.5
MOMENT_SECONDS = 0.5
"""How long after a verdict this rank's part in it may take to show."""

_OF_OTHERS = re.compile(
    r"gloo/|NCCL|Connection (closed|reset|refused)|Timed out|timed out|Broken pipe|remote process exited|Socket Timeout"
    r"|is killed by signal: Terminated"  # a data loader's helper; launchers end all processes of a rank
)


def is_of_others(error: BaseException) -> bool:
    """Whether an exception tells of the end of another rank, or of the run, rather than of a fault of this one."""
    return isinstance(error, RuntimeError | ConnectionError) and bool(_OF_OTHERS.search(str(error)))


class FailureWatch:
    """The watch of one rank.

    Args:
        root: rank 0, where the hub is.
        channel: to the hub.
        hub: on rank 0, and the thread it runs in.
        timeout_seconds: a communication that takes longer is complained about.
        heeds_sigterm: end on SIGTERM with a message; False where the program itself reacts to it.
        process: what is watched.
        clock: real time, or a test's.
    """

    def __init__(
        self,
        rank: int,
        root: Member,
        channel: LineChannel,
        timeout_seconds: float,
        hub: tuple[Hub, threading.Thread] | None = None,
        heeds_sigterm: bool = True,
        process: ThisProcess | None = None,
        clock: Clock = REAL,
    ) -> None:
        self.rank, self.root, self.channel, self.hub = rank, root, channel, hub
        self.process, self.clock = process or ThisProcess(), clock
        self.timeout_seconds, self.heeds_sigterm = timeout_seconds, heeds_sigterm
        self._error: BaseException | None = None
        self._text = ""
        self._failed_at: float | None = None
        self._has_complained = False
        self._stopping = False
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._watching_is_over = threading.Event()
        self._signals = socket.socketpair()
        self._previous: Callable[..., Any] | int | None = None
        self._thread = threading.Thread(target=self.run, name="failure watch", daemon=True)

    # --- from the main thread ---

    def start(self) -> None:
        """Begin to watch."""
        if not faulthandler.is_enabled():
            with suppress(OSError, ValueError, AttributeError):  # a stream that is no file
                faulthandler.enable()  # a crash shows where
        if self.heeds_sigterm and self._in_main_thread:
            for end in self._signals:
                end.setblocking(False)
            # Python runs handlers in the main thread, which may be inside a collective; the byte comes at once.
            signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
            self._previous = signal.signal(signal.SIGTERM, lambda *_: None)
        os.register_at_fork(after_in_child=self._forget_in_child)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye: from now on this process may end."""
        if self._stopping:
            return
        self._stopping = True
        self.channel.send({"kind": "bye"})
        if self._previous is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._previous)
        if self.hub is not None:
            self.clock.join(self.hub[1], 5)
            self.hub[0].close()
            self.clock.join(self.hub[1], 2)
        self.channel.close()

    def note(self, error: BaseException) -> None:
        """Something has gone wrong here: a verdict that comes now finds what it interrupted."""
        self._error = error

    def fail(self, error: BaseException, text: str) -> NoReturn:
        """End all ranks because of `error`; `text` is printed here if this is the first failure."""
        self._error, self._text = error, text
        message = {"kind": "complaint", "state": self.process.state(error).to_json()}
        if not is_of_others(error):
            message |= {"kind": "failed", "summary": summary_of(error)}
        now = self.clock.now()
        if self._failed_at is None:  # patience counts from the first complaint
            self._failed_at = now
        self.channel.send(message)
        deadline = now + PATIENCE_SECONDS + 4 * POLL_SECONDS
        while not self._watching_is_over.is_set() and self.clock.now() < deadline:  # the thread ends this process
            # Handlers of signals raise here, those of data loaders for one; `join` would take a thread for ended then.
            with suppress(Exception):
                self.clock.wait_for(self._watching_is_over, POLL_SECONDS)
        self._speak_and_leave()

    # --- in the thread ---

    def run(self) -> None:
        """Watch until `stop`, or until this process ends; the work of its thread."""
        try:
            self._watch()
        finally:
            self._watching_is_over.set()

    def _watch(self) -> None:
        while not self._stopping:
            try:
                ready = readable([self.channel.connection, self._signals[0]], POLL_SECONDS, self.clock)
            except (OSError, ValueError):  # closed by `stop`
                return
            if self._signals[0] in ready:
                self._on_signal(self._signals[0].recv(64))
            if self.channel.connection in ready:
                self._hear()
            if not self._stopping:
                self._complain_if_late()
                if self._failed_at is not None and self.clock.now() - self._failed_at > PATIENCE_SECONDS:
                    self._speak_and_leave()

    def _hear(self) -> None:
        messages, is_open = self.channel.receive()
        for message in messages:
            match message["kind"]:
                case "report":
                    self.channel.send({"kind": "state", "state": self.process.state(self._error).to_json()})
                case "speak":
                    self.process.write(self._text)
                    self._text = ""
                    self.channel.send({"kind": "told"})
                case "verdict":
                    self._leave(tuple(message["ranks"]), message["reason"])
                case "bye":
                    self._stopping = True
        if not is_open and not self._stopping:
            self._leave((0,), f"{self.root} died without a word: killed, or crashed")

    def _complain_if_late(self) -> None:
        wait = self.process.longest_wait()
        if self._has_complained or wait is None or wait.seconds < self.timeout_seconds:
            return
        self._has_complained = True
        self._failed_at = self.clock.now()
        self._text = f"waited too long: {wait}\n"
        self.channel.send({"kind": "complaint", "state": RankState(wait, "").to_json()})

    def _on_signal(self, numbers: bytes) -> None:
        if signal.SIGTERM not in numbers:
            return
        deadline = self.clock.now() + SIGNAL_SECONDS
        while (left := deadline - self.clock.now()) > 0:
            if readable([self.channel.connection], left, self.clock):
                self._hear()
        state = self.process.state(self._error)
        self.channel.send({"kind": "failed", "summary": "ended by SIGTERM", "state": state.to_json()})
        doing = f"in {state.wait}" if state.wait else f"at {state.at}"
        self.process.end(128 + signal.SIGTERM, f"[rank {self.rank}] ended by SIGTERM, {doing}\n", self._linger)

    def _forget_in_child(self) -> None:
        """A forked process (of a data loader) must not hold the connection open, nor treat signals as this one does."""
        if self._stopping:
            return
        self._stopping = True
        self.channel.close()
        if self.hub is not None:
            self.hub[0].forget_in_child()
        if self._previous is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # --- the end ---

    def _speak_and_leave(self) -> NoReturn:
        """Nobody has said why: say what is known here."""
        error = self._error
        if self.rank != 0 and (error is None or is_of_others(error)):
            self._leave((0,), f"{self.root} does not answer: frozen, or its machine is gone")
        self.process.end(1, self._text, self._linger)

    def _leave(self, blamed: tuple[int, ...], reason: str) -> NoReturn:
        """End with the verdict, in as many words as this rank's part in it needs."""
        state, error = self._state_soon(), self._error
        is_own_fault = error is not None and not is_of_others(error)
        if self.rank in blamed and is_own_fault:
            text = self._text  # empty if it has been printed before
        elif self.rank in blamed:
            stack = f". Its Python stack:\n{self.process.stack()}" if error is None else f"\n{self._text}"
            text = f"[rank {self.rank}] stopping: {reason}{stack}"
        elif is_own_fault and reason.endswith(summary_of(error)):
            text = f"[rank {self.rank}] stopping: {reason}, as here\n"
        else:
            doing = f"waited: {state.wait}" if state.wait else f"was at {state.at}"
            also = f"\n[rank {self.rank}] failed too: {summary_of(error)}" if is_own_fault else ""
            text = f"[rank {self.rank}] stopping: {reason}. Rank {self.rank} {doing}{also}\n"
        self.process.end(1, text, self._linger)

    def _state_soon(self) -> RankState:
        """The present state; the main thread may be on its way into a wait, or out of one that has just failed."""
        deadline = self.clock.now() + MOMENT_SECONDS
        while (state := self.process.state(self._error)).wait is None and self.clock.now() < deadline:
            self.clock.sleep(0.02)
        return state

    def _linger(self) -> None:
        if self.hub is not None:
            self.clock.join(self.hub[1], 1)
            self.hub[0].linger()


def summary_of(error: BaseException | None) -> str:
    """Type and message of an exception, the latter cut to a line."""
    first, *more = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:300]}{' …' if more or len(first) > 300 else ''}"
