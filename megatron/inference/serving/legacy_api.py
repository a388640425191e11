"""PUT /api, as clients of this kind of server have always called it. Answers to bad requests are JSON strings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fastapi import Request

from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.beam_search import Tokens, beam_search
from megatron.inference.serving.clients import unless_gone
from megatron.inference.serving.legacy_fields import read_fields
from megatron.inference.serving.progress import json_safe
from megatron.inference.serving.service import Refusal, Service

LOGGED_CHARACTERS = 10_000

log = logging.getLogger(__name__)


async def answer(service: Service, request: Request) -> Any:
    """What `generate` gives for the body of a request.

    Raises:
        Refusal: as `generate`; or the body is not JSON, or the client has gone away.
    """
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    client = request.client.host if request.client else "unknown"
    return await unless_gone(request, generate(service, body, client))


async def generate(service: Service, body: Any, client: str) -> dict[str, Any]:
    """{text, segments, tokens, logprobs}: a row for each prompt; or {text, segments, scores}: a row for each beam.

    Args:
        client: address of who asks, for the log.

    Raises:
        Refusal: the call is not in order, or there is no room for it; with status 200 where its prompts are in order,
            but cannot be continued as it wants.
    """
    values = read_fields(body, service.limits.prompts, service.defaults)
    try:
        return await _generate(service, values, body, client)
    except Refusal as error:
        raise Refusal(200, error.message) if error.status == 400 else error from None


async def _generate(service: Service, values: Mapping[str, Any], body: Any, client: str) -> dict[str, Any]:
    rows = [service.tokens_of(prompt, values["add_BOS"]) for prompt in values["prompts"]]
    for row in rows:
        service.room(len(row), values["tokens_to_generate"])
    if not values["no_log"]:
        log.info("request IP: %s\n%s\nstart time: %s", client, json.dumps(body)[:LOGGED_CHARACTERS], datetime.now())
    if values["beam_width"] is not None:
        service.require_continuing("beam_width")
        return await _beams(service, values, rows[0])
    return await _texts(service, values, rows)


async def _texts(service: Service, values: Mapping[str, Any], rows: Sequence[list[int]]) -> dict[str, Any]:
    pairs = _newline_after_colon(service) if values["prevent_newline_after_colon"] else ()
    stop = ["\n\n"] * values["stop_on_double_eol"] + ["\n"] * values["stop_on_eol"]
    tickets = service.tickets((row, _params(values, number, pairs), stop) for number, row in enumerate(rows))
    pieces = await service.all_of(tickets)
    goes_on = service.continues_prompts
    tokens = [[*row * goes_on, *piece.tokens] for row, piece in zip(rows, pieces)]
    answer: dict[str, Any] = {
        "text": [prompt * goes_on + piece.text for prompt, piece in zip(values["prompts"], pieces)],
        "segments": [service.words(row)[0] for row in tokens],
        "tokens": tokens,
    }
    if values["logprobs"]:
        answer["logprobs"] = [
            [json_safe(value) for value in [*ticket.prompt.log_probs, *piece.log_probs]]
            for ticket, piece in zip(tickets, pieces)
        ]
    return answer


def _params(values: Mapping[str, Any], row: int, forbidden_pairs: tuple[tuple[int, int], ...]) -> SamplingParams:
    """How the tokens of a row are drawn."""
    return SamplingParams(
        temperature=float(values["temperature"]),
        top_k=values["top_k"],
        top_p=values["top_p"],
        top_p_decay=values["top_p_decay"] or 0.0,
        top_p_bound=values["top_p_bound"] or 0.0,
        num_tokens_to_generate=values["tokens_to_generate"],
        return_log_probs=values["logprobs"],
        seed=None if values["random_seed"] is None else values["random_seed"] + row,
        stop_token_ids=() if values["stop_token"] is None else (values["stop_token"],),
        forbidden_pairs=forbidden_pairs,
    )


def _newline_after_colon(service: Service) -> tuple[tuple[int, int], ...]:
    """The last token of a colon, and that of a newline: a tokenizer may put others before it."""
    return ((service.tokens_of(":")[-1], service.tokens_of("\n")[-1]),)


async def _beams(service: Service, values: Mapping[str, Any], row: list[int]) -> dict[str, Any]:
    """Each step asks the engine for the likeliest next tokens of all beams, whose common chunks it knows already."""
    forbidden = set(_newline_after_colon(service)) if values["prevent_newline_after_colon"] else set[tuple[int, int]]()

    async def extend(continuations: Sequence[Tokens], count: int) -> list[list[tuple[int, float]]]:
        texts = [[*row, *tokens] for tokens in continuations]
        params = SamplingParams(
            top_k=1, num_tokens_to_generate=1, top_n_logprobs=count + len(forbidden), ignore_termination=True
        )
        pieces = await service.all_of(service.tickets((text, params, ()) for text in texts))
        return [
            [one for one in piece.best[0] if (text[-1], one[0]) not in forbidden] for text, piece in zip(texts, pieces)
        ]

    found = await beam_search(
        extend,
        values["beam_width"],
        values["tokens_to_generate"],
        int(service.tokenizer.eod) if values["stop_token"] is None else values["stop_token"],
        values["length_penalty"],
    )
    continuation = service.detokenize_after(row)
    return {
        "text": [values["prompts"][0] + continuation(one.tokens) for one in found],
        "segments": [service.words([*row, *one.tokens])[0] for one in found],
        "scores": [one.score for one in found],
    }
