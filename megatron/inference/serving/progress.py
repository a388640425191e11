"""What a client sees of its request: text that grows, and where it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from megatron.core.inference.inference_request import FinishReason
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.serving.loop import Progress, PromptTold
from megatron.inference.serving.replicas import Front

BROKEN = "\ufffd"
"""What a tokenizer writes for the bytes of an unfinished character."""


@dataclass
class Piece:
    """What has come since the last one."""

    text: str
    tokens: list[int]
    reason: FinishReason | None = None
    log_probs: list[float] = field(default_factory=list)
    best: list[list[tuple[int, float]]] = field(default_factory=list)

    def __add__(self, later: Piece) -> Piece:
        return Piece(
            self.text + later.text,
            self.tokens + later.tokens,
            later.reason,
            self.log_probs + later.log_probs,
            self.best + later.best,
        )


class TextOfTokens:
    """The text of tokens as they come: nothing is shown that may change, or begin a stop word, later.

    Args:
        stop: texts that end the text, and are not part of it.
    """

    def __init__(self, detokenize: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.detokenize, self.stop = detokenize, [word for word in stop if word]
        self.shown, self.stopped = 0, False

    def take(self, tokens: Sequence[int], is_last: bool) -> str:
        """What can be shown now besides what was, of all `tokens` so far."""
        if self.stopped:
            return ""
        text = self.detokenize(list(tokens))
        found = [place for word in self.stop if (place := text.find(word)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not is_last:
            text = text[: len(text) - self._uncertain(text)]
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return piece

    def _uncertain(self, text: str) -> int:
        """Characters at the end that are not sure yet."""
        broken = len(text) - len(text.rstrip(BROKEN))
        whole = text[: len(text) - broken]
        starts = [length for word in self.stop for length in range(1, len(word)) if whole.endswith(word[:length])]
        return broken + max(starts, default=0)


class Ticket:
    """A submitted request, in an event loop.

    Closing the iteration over `pieces` early cancels the request, so that a client that goes away frees its place.
    """

    def __init__(
        self,
        loop: Front,
        tokens: Sequence[int],
        params: SamplingParams,
        detokenize: Callable[[list[int]], str],
        stop: Sequence[str] = (),
    ) -> None:
        self._loop, self._events = loop, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Progress | BaseException] = asyncio.Queue()
        self._text = TextOfTokens(detokenize, stop)
        self.prompt = PromptTold()
        """From the first piece on."""
        self.number = loop.submit(tokens, params, self._hear)
        self._ended = False

    def cancel(self) -> None:
        """It is not wanted any more; nothing if it has ended."""
        if not self._ended:
            self._ended = True
            self._loop.cancel(self.number)

    def _hear(self, item: Progress | BaseException) -> None:
        with suppress(RuntimeError):  # the event loop has been closed: nobody waits any more
            self._events.call_soon_threadsafe(self._queue.put_nowait, item)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until the end, which the last piece gives the reason of.

        Raises:
            EngineGone: the engine has stopped.
        """
        seen = 0
        try:
            while not self._ended:
                item = await self._queue.get()
                if isinstance(item, BaseException):
                    self._ended = True
                    raise item
                self._ended = item.reason is not None
                text = self._text.take(item.tokens, self._ended)
                reason = item.reason
                if self._text.stopped:
                    reason = FinishReason.STOP
                self.prompt = item.prompt
                yield Piece(
                    text,
                    list(item.tokens[seen:]),
                    reason,
                    list((item.log_probs or ())[seen:]),
                    list((item.best or ())[seen:]),
                )
                seen = len(item.tokens)
                if self._text.stopped:
                    return
        finally:
            self.cancel()

    async def whole(self) -> Piece:
        """All pieces in one."""
        result = Piece("", [])
        async for piece in self.pieces():
            result += piece
        return result


def json_safe(value: float) -> float | None:
    """JSON has no infinities and no nan."""
    return value if value == value and abs(value) != float("inf") else None
