"""A server over an engine, for programs that build engines of their own; tools/run_text_generation_server.py is one."""

from __future__ import annotations

import os
import signal
import socket
from argparse import Namespace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from fastapi import Request

from megatron.core.activity import communicating
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.utils import get_pg_size
from megatron.inference.serving import http, legacy_api
from megatron.inference.serving.app import build_app
from megatron.inference.serving.legacy_fields import read_fields
from megatron.inference.serving.loop import FAILED, STOPPED, EngineLoop
from megatron.inference.serving.replicas import Front, join_replicas
from megatron.inference.serving.service import Limits, Refusal, Service
from megatron.training import print_rank_0
from megatron.training.failure.process import farewells

DEFAULTS = {
    "model_name": None,
    "load": None,
    "api_key_env": None,
    "max_body_mb": 4.0,
    "max_tokens": None,
    "max_running": None,
    "max_waiting": 256,
}
"""Of the flags that a program does not have."""

FIELDS_OF_FLAGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "tokens_to_generate": "num_tokens_to_generate",
    "logprobs": "return_log_probs",
}


def service_of(front: Front, args: Namespace | None = None) -> Service:
    """What the routes stand on. `max_running` and `max_waiting` are of each copy of the model.

    Args:
        args: flags of the server; those that it has not have the `DEFAULTS`.
    """
    flags = Namespace(**(DEFAULTS | vars(args or Namespace())))
    tokenizer = front.engine.controller.tokenizer
    running = flags.max_running or front.engine.context.max_requests
    return Service(
        front,
        tokenizer,
        flags.model_name or Path(str(flags.load or "").removeprefix("hf:")).name or "model",
        getattr(tokenizer, "chat_tokens", None),
        os.environ[flags.api_key_env] if flags.api_key_env else None,
        Limits(
            body_bytes=int(flags.max_body_mb * 2**20),
            tokens_to_generate=flags.max_tokens,
            connections=(running + flags.max_waiting) * len(front.loads()),
        ),
        defaults_of_calls(args),
    )


def defaults_of_calls(args: Namespace | None) -> dict[str, Any]:
    """Fields of `PUT /api` that flags give a default.

    Raises:
        ValueError: a call that says nothing else could not be answered.
    """
    given = {field: getattr(args, flag, None) for field, flag in FIELDS_OF_FLAGS.items()}
    found = {field: value for field, value in given.items() if value is not None}
    try:
        read_fields({"prompts": ["a"]}, 1, found)
    except Refusal as error:
        flags = " ".join(f"--{FIELDS_OF_FLAGS[field]} {value}" for field, value in found.items())
        raise ValueError(f"{flags}: no call could be answered: {error.message}") from None
    return found


class MegatronGenerate:
    """`PUT /api` for an application of one's own: `app.put("/api")(MegatronGenerate(engine, args).put)`.

    Args:
        engine: a loop that runs, or the copies of the model behind it (`join_replicas`).
        args: flags of the server, see `service_of`.
    """

    def __init__(self, engine: Front, args: Namespace | None = None) -> None:
        self.service = service_of(engine, args)

    async def put(self, request: Request) -> Any:
        """The answer, or what was wrong with the call as a JSON string with its status."""
        return await legacy_api.answer(self.service, request)


class MegatronServer:
    """All routes over an engine.

    Args:
        model: the engine of this rank's model.
        args: flags of the server, see `service_of`.
        listener: a socket that has the port already.

    Raises:
        ValueError: the engine cannot take requests while others run.
    """

    def __init__(
        self, model: DynamicInferenceEngine, args: Namespace | None = None, *, listener: socket.socket | None = None
    ) -> None:
        if not isinstance(model, DynamicInferenceEngine):
            raise ValueError(f"a server takes a DynamicInferenceEngine, whose requests come and go, not {type(model)}")
        self.args, self._listener = args, listener
        self.loop = EngineLoop(model, getattr(args, "max_waiting", DEFAULTS["max_waiting"]))

    def run(self, url: str, port: int) -> None:
        """Serve until SIGINT or SIGTERM, on the address `url` and `port` of rank 0. All ranks call it.

        Raises:
            OSError: the port is taken, unless there is a `listener`.
        """
        is_first = torch.distributed.get_rank() == 0
        listener = self._listener or (http.bind(url, port) if is_first else None)
        front = join_replicas(self.loop)
        stop_on_signal(front)
        farewells.append(lambda: front.end(FAILED))
        server = None
        if listener is not None:
            service = service_of(front, self.args)
            server = http.HttpServer(build_app(service), listener)
            farewells.append(server.close)
            print_rank_0(f"serving {service.model_name} at http://{url}:{server.port}")
        self.loop.run()
        front.end(STOPPED)
        if server is not None:
            server.close()
        if get_pg_size(torch.distributed.group.WORLD) > get_pg_size(self.loop.group):
            with communicating("barrier", None, of="the end of all copies"):
                torch.distributed.barrier()
        print_rank_0("stopped")


def stop_on_signal(front: Front) -> None:
    """SIGINT and SIGTERM end the loops of all ranks together; a second one ends this process where it is.

    Launchers send them to all ranks: those that are not the first wait for its word.
    """
    is_first = torch.distributed.get_rank() == 0

    def stop(number: int, frame: FrameType | None) -> None:
        if is_first:
            front.stop()
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_DFL)

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, stop)
