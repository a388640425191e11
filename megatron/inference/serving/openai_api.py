"""The routes that clients of OpenAI's API call: models, completions, chat completions; whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron.core.inference.inference_request import FinishReason
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.serving.loop import EngineGone
from megatron.inference.serving.progress import Piece, Ticket, json_safe
from megatron.inference.serving.service import Refusal, Service, checked_params

REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}


class Common(BaseModel):
    """Fields of both kinds of completion. Unknown ones are refused, so that none is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None

    echo: bool = False
    """Give the prompt too; completions only."""

    def params(self, max_tokens: int, index: int, num_best: int, log_probs: bool) -> SamplingParams:
        """Of choice `index`."""
        return checked_params(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            num_tokens_to_generate=max_tokens,
            seed=None if self.seed is None else self.seed + index,
            return_log_probs=log_probs,
            top_n_logprobs=num_best,
            return_prompt_top_n_logprobs=self.echo and num_best > 0,
        )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class Completion(Common):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None


class ChatCompletion(Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


def models(service: Service) -> dict[str, Any]:
    """GET /v1/models; besides OpenAI's fields how long a text may be, and whether there is a chat template."""
    model = {
        "id": service.model_name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "local",
        "max_model_len": service.max_length,
        "chat": service.chat_template is not None,
    }
    return {"object": "list", "data": [model]}


def _require_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model_name:
        raise Refusal(404, f"model {name!r} is not served here; {service.model_name!r} is")


def prompts_of(service: Service, prompt: Any) -> list[list[int]]:
    """Token numbers of one text or many, given as text or as numbers.

    Raises:
        Refusal: there is none, or there are too many.
    """
    if isinstance(prompt, str):
        return [service.tokens_of(prompt)]
    if not prompt:
        raise Refusal(400, "prompt is empty")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    if len(prompt) > service.limits.prompts:
        raise Refusal(400, f"prompt has {len(prompt)} texts; at most {service.limits.prompts} are taken in one call")
    return [service.tokens_of(one) if isinstance(one, str) else list(one) for one in prompt]


def _tickets(
    service: Service, body: Common, prompts: Sequence[Sequence[int]], wanted: int | None, num_best: int, logs: bool
) -> list[Ticket]:
    """One for each choice of each prompt; all or none."""
    rooms = [service.room(len(prompt), wanted) for prompt in prompts]
    return service.tickets(
        (prompt, body.params(room, index, num_best, logs), body.stops)
        for prompt, room in zip(prompts, rooms)
        for index in range(body.n)
    )


def _usage(prompts: Sequence[Sequence[int]], num_generated: int) -> dict[str, int]:
    num_prompt = sum(map(len, prompts))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def _head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
    }


class Answer(ABC):
    """How one kind of completion writes its choices."""

    def __init__(self, service: Service, body: Common, prompts: list[list[int]], tickets: list[Ticket]) -> None:
        self.service, self.body, self.prompts, self.tickets = service, body, prompts, tickets
        self.head: dict[str, Any] = {}
        self.chunk_head: dict[str, Any] = {}

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole one."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        """What has come of it."""

    async def whole(self) -> dict[str, Any]:
        pieces = await self.service.all_of(self.tickets)
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        usage = _usage(self.prompts * self.body.n, sum(len(piece.tokens) for piece in pieces))
        return {**self.head, "choices": choices, "usage": usage}

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for ticket in self.tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: choices as they grow, their usage if asked for, [DONE]."""
        merged: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

        async def follow(index: int, ticket: Ticket) -> None:
            try:
                async for piece in ticket.pieces():
                    merged.put_nowait((index, piece))
                merged.put_nowait((index, None))
            except Exception as error:
                merged.put_nowait((index, error))

        tasks = [asyncio.create_task(follow(index, ticket)) for index, ticket in enumerate(self.tickets)]
        started: set[int] = set()
        held: dict[int, Piece] = {}  # tokens whose text cannot be shown yet
        running, generated = len(tasks), 0
        try:
            while running:
                index, piece = await merged.get()
                if piece is None:
                    running -= 1
                    continue
                if isinstance(piece, EngineGone):
                    yield f"data: {json.dumps(error_body(Refusal(503, str(piece))))}\n\n"
                    return
                if isinstance(piece, BaseException):
                    raise piece
                generated += len(piece.tokens)
                held[index] = held[index] + piece if index in held else piece
                if held[index].text or piece.reason is not None or index not in started:
                    choice = self.delta(index, held.pop(index), index not in started)
                    started.add(index)
                    yield f"data: {json.dumps({**self.chunk_head, 'choices': [choice]})}\n\n"
            if (self.body.stream_options or {}).get("include_usage"):
                usage = _usage(self.prompts * self.body.n, generated)
                yield f"data: {json.dumps({**self.chunk_head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()


class CompletionAnswer(Answer):
    body: Completion

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.head = self.chunk_head = _head("text_completion", "cmpl", self.service)
        self._lengths = [0] * len(self.tickets)
        """Characters of the tokens told of so far."""
        goes_on = self.service.continues_prompts and not self.body.echo
        self._last = [self.prompts[index // self.body.n][-1:] if goes_on else [] for index in range(len(self.tickets))]
        """The token before the next one, whose text depends on it."""

    def _echo(self, index: int) -> list[int]:
        return self.prompts[index // self.body.n] if self.body.echo else []

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.delta(index, piece, is_first=True)

    def delta(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        echo = self._echo(index) if is_first else []
        return {
            "index": index,
            "text": self.service.detokenize(echo) + piece.text,
            "logprobs": self._log_probs(index, piece, echo),
            "finish_reason": piece.reason and REASONS[piece.reason],
        }

    def _log_probs(self, index: int, piece: Piece, echo: list[int]) -> dict[str, Any] | None:
        """Of the tokens of the piece, behind those of `echo`, the prompt's."""
        if self.body.logprobs is None:
            return None
        tokens, values, best = [*echo, *piece.tokens], list(piece.log_probs), list(piece.best)
        if echo:
            known = self.tickets[index].prompt
            values = [float("nan"), *known.log_probs, *values]
            best = [[], *known.best, *best]
        words, offsets = self.service.words(tokens, self._lengths[index], self._last[index])
        self._lengths[index] += sum(map(len, words))
        self._last[index] = tokens[-1:] or self._last[index]
        return {
            "tokens": words,
            "token_logprobs": [json_safe(value) for value in values],
            "text_offset": offsets,
            "top_logprobs": [
                {self.service.detokenize([token]): json_safe(value) for token, value in row} or None for row in best
            ]
            if self.body.logprobs
            else None,
        }


class ChatAnswer(Answer):
    body: ChatCompletion

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.head = _head("chat.completion", "chatcmpl", self.service)
        self.chunk_head = self.head | {"object": "chat.completion.chunk"}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": self._log_probs(piece),
            "finish_reason": piece.reason and REASONS[piece.reason],
        }

    def delta(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        return {
            "index": index,
            "delta": delta | {"content": piece.text},
            "logprobs": self._log_probs(piece),
            "finish_reason": piece.reason and REASONS[piece.reason],
        }

    def _log_probs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def told(token: int, value: float) -> dict[str, Any]:
            text = self.service.detokenize([token])
            return {"token": text, "logprob": json_safe(value), "bytes": list(text.encode())}

        best = piece.best or [[]] * len(piece.tokens)
        rows = zip(piece.tokens, piece.log_probs, best)
        return {
            "content": [
                told(token, value) | {"top_logprobs": [told(*one) for one in row]} for token, value, row in rows
            ]
        }


def completion(service: Service, body: Completion) -> Answer:
    """Raises Refusal: it is not served."""
    _require_model(service, body.model)
    if body.max_tokens == 0 and not body.echo:
        raise Refusal(400, "max_tokens 0 generates nothing: give echo true to score the prompt")
    if body.echo:
        service.require_continuing("echo")
    prompts = prompts_of(service, body.prompt)
    logs = body.logprobs is not None
    tickets = _tickets(service, body, prompts, body.max_tokens, body.logprobs or 0, logs)
    return CompletionAnswer(service, body, prompts, tickets)


def chat_completion(service: Service, body: ChatCompletion) -> Answer:
    """Raises Refusal: it is not served."""
    _require_model(service, body.model)
    if body.echo:
        raise Refusal(400, "echo is for /v1/completions")
    if service.chat_template is None:
        raise Refusal(400, "the tokenizer has no chat template: use /v1/completions")
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs true")
    try:
        prompt = service.chat_template([message.model_dump(exclude_none=True) for message in body.messages])
    except Exception as error:  # a template is a program of the tokenizer's author
        raise Refusal(400, f"the chat template does not take these messages: {error}") from None
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    tickets = _tickets(service, body, [prompt], wanted, body.top_logprobs, body.logprobs)
    return ChatAnswer(service, body, [prompt], tickets)


def error_body(refusal: Refusal) -> dict[str, Any]:
    """As clients of OpenAI's API expect it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.status}}
