"""Messages between two processes: one JSON object a line over a TCP connection."""

from __future__ import annotations

import json
import selectors
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from megatron.training.failure.clock import REAL, Clock

MOST_BYTES = 2**20
"""A line longer than this is nobody's that belongs here."""


def tune(connection: socket.socket) -> None:
    """Send at once, and notice within two minutes when the other machine is gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def readable(connections: Iterable[socket.socket], seconds: float, clock: Clock = REAL) -> list[socket.socket]:
    """Those of the connections that have something to read, or are closed, once there are any or `seconds` are over."""
    with selectors.DefaultSelector() as selector:  # `select.select` knows no descriptor above 1023
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        return [key.fileobj for key, _ in clock.select(selector, seconds)]  # type: ignore[misc]


class LineChannel:
    """One end of a connection. Sending may happen in any thread, receiving in one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank: int | None = None
        """The rank at the other end, once it has said so."""
        self._received = b""
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> bool:
        """Whether the message could be handed to the kernel."""
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """What has arrived, waiting for at least something; and whether the connection is still open."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], False
        return messages, bool(data) and len(self._received) < MOST_BYTES

    def wait_for_close(self, seconds: float, clock: Clock = REAL) -> None:
        """Wait until the other end has closed, dropping what it says."""
        deadline = clock.now() + seconds
        while (left := deadline - clock.now()) > 0:
            if not readable([self.connection], left, clock) or not self.receive()[1]:
                return

    def close(self) -> None:
        """Close this end."""
        with suppress(OSError):
            self.connection.close()
