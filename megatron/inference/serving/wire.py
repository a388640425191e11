"""What copies of a model say to each other: requests and what they give, as lines of JSON."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from megatron.core.inference.inference_request import DynamicInferenceRequest, FinishReason
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.serving.loop import Best, Listener, Progress, PromptTold
from megatron.training.failure.line_channel import tune

Message = dict[str, Any]


class Wire:
    """Lines of JSON to and from another process. `send` never waits, so that signal handlers may call it as well."""

    def __init__(self, connection: socket.socket) -> None:
        tune(connection)
        self._connection = connection
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lines = connection.makefile("rb")
        threading.Thread(target=self._write, name="replica: sends", daemon=True).start()

    def send(self, message: Message) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        """Nothing more is sent; what the other end still sends can be read."""
        self._outgoing.put(None)

    def _write(self) -> None:
        with suppress(OSError):  # who reads hears of it
            while (message := self._outgoing.get()) is not None:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
            self._connection.shutdown(socket.SHUT_WR)

    def hello(self) -> Message:
        """The first message; nothing if there is none, or one too long for that."""
        try:
            message = json.loads(self._lines.readline(1024))
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def messages(self) -> Iterator[Message]:
        """Until the other end closes."""
        with suppress(OSError):
            for line in self._lines:
                if line.endswith(b"\n"):
                    yield json.loads(line)


class Heard:
    """What rank 0 has heard of a request that another copy runs."""

    def __init__(self, number: int, tokens: Sequence[int], params: SamplingParams, listener: Listener) -> None:
        self.listener = listener
        self.request = DynamicInferenceRequest(
            request_id=number, prompt_tokens=list(tokens), sampling_params=params, generated_tokens=[]
        )
        self.log_probs: list[float] | None = None
        self.best: Best | None = None
        self.prompt = PromptTold()

    def take(self, message: Message) -> Progress:
        """All there is, with what a message adds."""
        request, end = self.request, message["end"]
        request.generated_tokens += message["tokens"]
        if message["log_probs"] is not None:
            self.log_probs = [*(self.log_probs or ()), *message["log_probs"]]
        if message["best"] is not None:
            self.best = [*(self.best or ()), *pairs(message["best"])]
        if message["prompt"] is not None:
            self.prompt = PromptTold(message["prompt"]["log_probs"], pairs(message["prompt"]["best"]))
        if end is not None:
            request.finish_reason = FinishReason(end)
            request.generated_log_probs, request.generated_top_n_token_logprobs = self.log_probs, self.best
        return Progress(
            tuple(request.generated_tokens),
            request,
            request.finish_reason,
            None if self.log_probs is None else tuple(self.log_probs),
            None if self.best is None else tuple(self.best),
            self.prompt,
        )


def pairs(rows: list[list[list[Any]]]) -> Best:
    """JSON has no tuples."""
    return [[(token, value) for token, value in row] for row in rows]


def message_of(number: int, item: Progress, since: int) -> Message:
    """What of a request is new after its first `since` tokens; of its prompt, with the first of them."""
    return {
        "of": number,
        "tokens": item.tokens[since:],
        "log_probs": None if item.log_probs is None else item.log_probs[since:],
        "best": None if item.best is None else item.best[since:],
        "prompt": asdict(item.prompt) if since == 0 else None,
        "end": None if item.reason is None else item.reason.value,
    }


def added(number: int, tokens: Sequence[int], params: SamplingParams) -> Message:
    """A new request."""
    return {"do": "add", "number": number, "tokens": list(tokens), "params": asdict(params)}


def params_of(message: Message) -> SamplingParams:
    """Of a new request."""
    given = dict(message["params"])
    given["stop_token_ids"] = tuple(given["stop_token_ids"])
    given["forbidden_pairs"] = tuple(tuple(pair) for pair in given["forbidden_pairs"])
    return SamplingParams(**given)
