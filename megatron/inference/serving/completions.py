"""POST /completions: the older cousin of /v1/completions, with log-probabilities by character offsets."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from megatron.inference.serving.openai_api import prompts_of
from megatron.inference.serving.progress import Piece, Ticket, json_safe
from megatron.inference.serving.service import Refusal, Service, checked_params


class Body(BaseModel):
    """Fields of a call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, ge=0, le=1)
    logprobs: int = Field(0, ge=0)
    echo: bool = False
    seed: int = -1
    best_of: int = 1
    n: int = 1
    stop: str | list[str] | None = None


def _check(body: Body) -> None:
    rules = [
        (body.max_tokens > 0 or body.echo, "max_tokens 0 needs echo"),
        (body.best_of == 1, "best_of above 1 is not supported"),
        (body.n == 1, "n above 1 is not supported"),
        (not (body.logprobs and body.max_tokens), "logprobs need max_tokens 0: only prompts are scored here"),
        (body.logprobs <= 10, "logprobs is at most 10"),
    ]
    for holds, message in rules:
        if not holds:
            raise Refusal(400, message)


async def complete(service: Service, body: Body) -> dict[str, Any]:
    """{choices: [{index, text, logprobs}]}.

    Raises:
        Refusal: the call is not in order, or there is no room for it.
    """
    _check(body)
    if body.echo:
        service.require_continuing("echo")
    prompts = prompts_of(service, body.prompt)
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    settings = [
        checked_params(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            num_tokens_to_generate=service.room(len(prompt), body.max_tokens),
            seed=None if body.seed < 0 else body.seed + row,
            return_log_probs=True,
            top_n_logprobs=body.logprobs,
            return_prompt_top_n_logprobs=body.logprobs > 0,
        )
        for row, prompt in enumerate(prompts)
    ]
    tickets = service.tickets((prompt, params, stop) for prompt, params in zip(prompts, settings))
    pieces = await service.all_of(tickets)
    rows = zip(prompts, tickets, pieces)
    return {"choices": [_choice(service, body, index, *row) for index, row in enumerate(rows)]}


def _choice(
    service: Service, body: Body, index: int, prompt: list[int], ticket: Ticket, piece: Piece
) -> dict[str, Any]:
    text = service.detokenize(prompt) + piece.text if body.echo else piece.text
    tokens, known = [*prompt, *piece.tokens], ticket.prompt
    values, best = [*known.log_probs, *piece.log_probs], [*known.best, *piece.best]
    skipped = 0 if body.echo else len(prompt)
    if not service.continues_prompts:  # the first place is the decoder's start token
        tokens, skipped = [0, *piece.tokens], 1
    words, offsets = service.words(tokens[skipped:])
    log_probs: list[float | None] = [None, *(json_safe(value) for value in values)]
    top: list[Any] = [None]
    top += [{service.detokenize([token]): json_safe(value) for token, value in row} for row in best]
    return {
        "index": index,
        "text": text,
        "logprobs": {
            "token_logprobs": log_probs[skipped:],
            "tokens": words,
            "text_offset": offsets,
            "top_logprobs": top[skipped:] if body.logprobs else None,
        },
    }
