"""The routes of a text generation server, on FastAPI."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron.inference.serving import completions, legacy_api, metrics, openai_api
from megatron.inference.serving.clients import unless_gone
from megatron.inference.serving.loop import EngineGone
from megatron.inference.serving.service import Refusal, Service

OPEN_TO_ALL = frozenset({"/", "/index.html", "/health"})
"""Without an API key."""

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from anywhere, and talks to this server alone."""

log = logging.getLogger(__name__)


class Gate:
    """In front of all routes: the API key, how many calls there are, and the length of bodies, which are not read to
    their end if too long.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.num_calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] in OPEN_TO_ALL:
            await self.app(scope, receive, send)
            return
        most = self.service.limits.connections
        self.num_calls += 1
        try:
            self.service.require_key(Headers(scope=scope).get("authorization"))
            if most is not None and self.num_calls > most:
                raise self.service.overloaded(f"{most} calls are being answered already")
            body = await self._body(receive)
            if body is not None:
                await self.app(scope, _after(body, receive), send)
        except Refusal as error:
            await refused(scope["path"], error)(scope, receive, send)
        finally:
            self.num_calls -= 1

    async def _body(self, receive: Receive) -> bytes | None:
        """None if the client went away."""
        most = self.service.limits.body_bytes
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > most:
                raise Refusal(413, f"the body is longer than {most} bytes")
        return b"".join(chunks)


def _after(body: bytes, receive: Receive) -> Receive:
    """What an application receives whose body has been read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def refused(path: str, error: Refusal) -> JSONResponse:
    """As clients of the route expect it: a JSON string, or OpenAI's error object."""
    body: Any = error.message if path == "/api" else openai_api.error_body(error)
    return JSONResponse(body, error.status, error.headers)


def build_app(service: Service) -> FastAPI:
    """The page at /, the routes of docs/inference.md, /health and /metrics. Errors never show a traceback."""
    app = FastAPI(title="Text generation", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        return refused(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        places = [".".join(str(part) for part in one["loc"] if part != "body") for one in error.errors()]
        words = "; ".join(f"{place}: {one['msg']}" for place, one in zip(places, error.errors()))
        return refused(request.url.path, Refusal(400, words[:2000]))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        return refused(request.url.path, Refusal(error.status_code, str(error.detail), dict(error.headers or {})))

    @app.exception_handler(EngineGone)
    async def gone(request: Request, error: EngineGone) -> Response:
        return refused(request.url.path, Refusal(503, str(error)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refused(request.url.path, Refusal(500, "something went wrong here; see the server's log"))

    @app.get("/", include_in_schema=False)
    @app.get("/index.html", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers=PAGE_HEADERS)

    @app.put("/api")
    async def api(request: Request) -> Any:
        return await legacy_api.answer(service, request)

    @app.post("/completions")
    async def old_completions(request: Request, body: completions.Body) -> Any:
        return await unless_gone(request, completions.complete(service, body))

    @app.get("/v1/models")
    async def models() -> Any:
        return openai_api.models(service)

    @app.post("/v1/completions")
    async def new_completions(request: Request, body: openai_api.Completion) -> Any:
        return await _answer(request, openai_api.completion(service, body))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: openai_api.ChatCompletion) -> Any:
        return await _answer(request, openai_api.chat_completion(service, body))

    @app.get("/health")
    async def health() -> Any:
        if service.loop.gone is not None:
            raise service.loop.gone
        loads = service.loop.loads()
        return {"status": "ok"} | ({"replicas": [{"requests": load} for load in loads]} if len(loads) > 1 else {})

    @app.get("/metrics")
    def exposition() -> PlainTextResponse:  # in a thread: copies of the model elsewhere are asked
        return PlainTextResponse(metrics.exposition(service.loop.samples()), media_type="text/plain; version=0.0.4")

    return app


async def _answer(request: Request, answer: openai_api.Answer) -> Any:
    if not answer.body.stream:
        return await unless_gone(request, answer.whole())
    return EventStream(answer)


class EventStream(StreamingResponse):
    """Server-sent events of an answer, which is cancelled when the client goes away, even before the first of them."""

    def __init__(self, answer: openai_api.Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()
