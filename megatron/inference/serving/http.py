"""The web server beside an engine: its port is known to be free early, and it ends with its clients answered."""

from __future__ import annotations

import socket
import threading

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 3
"""How long clients may take to read the last of their answers."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port; port 0 is any free one. Nobody can connect before a server has it.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} --port {port} cannot be listened on: {reason}") from None
    return listener


class HttpServer:
    """Serves an application in a thread of its own."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        listener.listen()
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """No new connections; return when those there are have been answered, or after a few seconds."""
        self._server.should_exit = True
        self._thread.join(GRACE_SECONDS + 1)
