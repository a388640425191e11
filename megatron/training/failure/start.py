"""Starting the watch on all ranks of a run."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading

import torch.distributed as dist

from megatron.training.failure.hub import Hub
from megatron.training.failure.line_channel import LineChannel, tune
from megatron.training.failure.verdict import Member
from megatron.training.failure.watch import FailureWatch

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0

_watch: FailureWatch | None = None


def current_watch() -> FailureWatch | None:
    """The watch of this process, None if there is none."""
    return _watch


def start_failure_watch(timeout_seconds: float, heeds_sigterm: bool = True) -> None:
    """Watch over all ranks of the default process group until `stop_failure_watch`. Communicates: broadcast, barrier.

    Args:
        timeout_seconds: how long a communication may take.
        heeds_sigterm: whether SIGTERM ends a rank; not where the program saves and stops on it.
    """
    global _watch
    if dist.get_world_size() == 1:
        return
    rank, hub = dist.get_rank(), None
    address: list[tuple[str, int, str, Member] | None] = [None]
    if rank == 0:
        token = secrets.token_hex(16)
        server = listen_to_ranks()
        address = [(*server.getsockname()[:2], token, Member(0, os.getpid(), socket.gethostname()))]
        hub = Hub(server, token, dist.get_world_size())
    dist.broadcast_object_list(address, src=0)
    assert address[0] is not None
    thread = threading.Thread(target=hub.run, name="failure hub", daemon=True) if hub is not None else None
    if thread is not None:
        thread.start()
    host, port, token, root = address[0]
    channel = _join(rank, host, port, token)
    dist.barrier()  # from here on all are there
    if channel is not None:
        served = (hub, thread) if hub is not None and thread is not None else None
        watch = FailureWatch(rank, root, channel, timeout_seconds, served, heeds_sigterm)
        watch.start()
        _watch = watch


def _join(rank: int, host: str, port: int, token: str) -> LineChannel | None:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        logger.warning(
            "rank %d cannot reach rank 0 at %s port %d (%s): it will not hear of failures of others before "
            "--distributed-timeout-minutes have passed",
            *(rank, host, port, error),
        )
        return None
    connection.settimeout(None)
    tune(connection)
    channel = LineChannel(connection)
    channel.send({"kind": "hello", "token": token, "rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
    return channel


def stop_failure_watch() -> None:
    """From now on ranks may end. Call it after the last communication, on all ranks."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def listen_to_ranks() -> socket.socket:
    """A server on an address of this machine that the other ranks know: the master's, if that is this one."""
    for name in (os.getenv("MASTER_ADDR"), socket.gethostname()):
        if not name:
            continue
        try:
            family, *_, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=1024)
        except OSError:  # another machine's address
            continue
    return socket.create_server(("", 0), backlog=1024)
