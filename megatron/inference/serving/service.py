"""What all routes share: the engine, the tokenizer, limits, and how errors are told."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from megatron.core.inference.contexts import MaxSequenceLengthOverflowError
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.continuation import text_behind
from megatron.inference.serving.loop import EngineGone, Overloaded
from megatron.inference.serving.progress import Piece, Ticket
from megatron.inference.serving.replicas import Front

Message = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 4 << 20
    prompts: int = 128
    """In one call."""
    tokens_to_generate: int | None = None
    """For a prompt; None is as many as fit."""
    connections: int | None = None
    """Calls that are answered at the same time."""
    retry_after_seconds: int = 1
    """Told to clients that come while too many wait."""


class Refusal(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


@dataclass
class Service:
    """A model behind routes.

    Args:
        tokenizer: with `tokenize`, `detokenize`, `eod`, `bos`.
        model_name: as clients call it.
        chat_template: (messages) -> tokens of the prompt; None where the tokenizer has no template.
        api_key: clients must send it; None is open to all that reach the port.
    """

    loop: Front
    tokenizer: Any
    model_name: str
    chat_template: Callable[[list[Message]], list[int]] | None = None
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of fields of `PUT /api`, instead of their own."""
    started: float = field(default_factory=time.time)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self.loop.engine.context.max_sequence_length

    @property
    def continues_prompts(self) -> bool:
        """A text goes on from its prompt; otherwise it is an answer to it, as of a model with an encoder."""
        return self.loop.engine.context.continues_prompts

    def require_continuing(self, field: str) -> None:
        """Raises Refusal: what `field` asks for is of models that continue their prompts."""
        if not self.continues_prompts:
            raise Refusal(400, f"{field} is for models that continue their prompts; this one answers them")

    def require_key(self, header: str | None) -> None:
        """Raises Refusal: an API key is asked for, and this is not it."""
        if self.api_key is None:
            return
        given = (header or "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self.api_key.encode()):
            raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    def tokens_of(self, text: str, add_bos: bool = False) -> list[int]:
        """Raises Refusal: the text is empty, or cannot be tokenized."""
        try:
            tokens = [int(token) for token in self.tokenizer.tokenize(text)]
        except (ValueError, UnicodeError) as error:
            raise Refusal(400, f"the prompt cannot be tokenized: {error}") from None
        tokens = [int(self.tokenizer.bos), *tokens] if add_bos else tokens
        if not tokens:
            raise Refusal(400, "the prompt is empty; give some text")
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.detokenize(list(tokens))

    def room(self, num_prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens to generate.

        Raises:
            Refusal: more are wanted than fit, or than one may ask for.
        """
        fits = self.loop.engine.context.room_for(num_prompt_tokens)
        most = fits if self.limits.tokens_to_generate is None else min(fits, self.limits.tokens_to_generate)
        if fits < 0 or (wanted is not None and wanted > most):
            raise Refusal(
                400,
                f"the prompt has {num_prompt_tokens} tokens and {wanted or 0} more were asked for; a text has at most "
                f"{self.max_length} tokens here" + (f", of which {most} may be new" if most != fits else ""),
            )
        return most if wanted is None else wanted

    def ticket(self, tokens: Sequence[int], params: SamplingParams, stop: Sequence[str] = ()) -> Ticket:
        """A submitted request.

        Raises:
            Refusal: it is refused, there are too many, or the engine is gone.
        """
        try:
            self.loop.engine.check_prompt(tokens, params.num_tokens_to_generate)
            before = tokens if self.continues_prompts else ()
            return Ticket(self.loop, tokens, params, self.detokenize_after(before), stop)
        except Overloaded as error:
            raise self.overloaded(str(error)) from None
        except EngineGone as error:
            raise Refusal(503, str(error)) from None
        except (ValueError, MaxSequenceLengthOverflowError) as error:
            raise Refusal(400, str(error)) from None

    def overloaded(self, why: str) -> Refusal:
        """Tells clients when to come back."""
        return Refusal(503, f"{why}: try again later", {"Retry-After": str(self.limits.retry_after_seconds)})

    def tickets(self, requests: Iterable[tuple[Sequence[int], SamplingParams, Sequence[str]]]) -> list[Ticket]:
        """One for each (tokens, settings, texts that end it): all or none.

        Raises:
            Refusal: as `ticket`; those before are cancelled.
        """
        submitted: list[Ticket] = []
        try:
            for request in requests:
                submitted.append(self.ticket(*request))
        except Refusal:
            for ticket in submitted:
                ticket.cancel()
            raise
        return submitted

    async def all_of(self, tickets: Sequence[Ticket]) -> list[Piece]:
        """What becomes of each; none goes on if one fails, or if nobody waits for them any more."""
        try:
            return await asyncio.gather(*(ticket.whole() for ticket in tickets))
        finally:
            for ticket in tickets:
                ticket.cancel()

    def detokenize_after(self, before: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """(tokens) -> their text behind the tokens `before`: alone, many tokenizers give it without its first space."""
        return text_behind(self.detokenize, before)

    def words(self, tokens: Sequence[int], begin: int = 0, before: Sequence[int] = ()) -> tuple[list[str], list[int]]:
        """The text of each token, and where it begins in the texts of all, of which the first begins at `begin`.

        Args:
            before: the token before them, if there is one.
        """
        lefts = [before, *([token] for token in tokens)]
        texts = [self.detokenize_after(left)([token]) for left, token in zip(lefts, tokens)]
        return texts, list(accumulate(map(len, texts), initial=begin))[:-1]


def checked_params(**values: Any) -> SamplingParams:
    """Raises Refusal: a value is out of its range."""
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise Refusal(400, str(error)) from None
