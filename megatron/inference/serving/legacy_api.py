"""PUT /api, as clients of this kind of server have always called it. Answers to bad requests are JSON strings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.serving.progress import json_safe
from megatron.inference.serving.service import Refusal, Service

Check = Callable[[Any], str | None]
"""(value) -> what is wrong with it."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(low: int, high: int | None = None) -> Check:
    def check(value: Any) -> str | None:
        fits = _is_int(value) and value >= low and (high is None or value <= high)
        return None if fits else f"must be a whole number from {low}" + ("" if high is None else f" to {high}")

    return check


def _bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _share(value: Any) -> str | None:
    return None if isinstance(value, float) and 0 <= value <= 1 else "must be a number with a point, from 0.0 to 1.0"


def _temperature(value: Any) -> str | None:
    return None if _is_number(value) and 0 < value <= 100 else "must be a number above 0, up to 100"


def _number(value: Any) -> str | None:
    return None if _is_number(value) and abs(value) < 1e9 else "must be a number"


CHECKS: dict[str, Check] = {
    "tokens_to_generate": _int(0),
    "logprobs": _bool,
    "temperature": _temperature,
    "top_k": _int(0, 1000),
    "top_p": _share,
    "top_p_decay": _share,
    "top_p_bound": _share,
    "add_BOS": _bool,
    "stop_on_double_eol": _bool,
    "stop_on_eol": _bool,
    "prevent_newline_after_colon": _bool,
    "random_seed": _int(0),
    "no_log": _bool,
    "beam_width": _int(1),
    "stop_token": _int(0),
    "length_penalty": _number,
}

DEFAULTS: dict[str, Any] = {
    "tokens_to_generate": 64,
    "logprobs": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "top_p_decay": 0.0,
    "top_p_bound": 0.0,
    "add_BOS": False,
    "stop_on_double_eol": False,
    "stop_on_eol": False,
    "prevent_newline_after_colon": False,
    "no_log": False,
}


@dataclass(frozen=True)
class Fields:
    """A call whose fields are in their ranges."""

    prompts: list[str]
    values: dict[str, Any]


def read_fields(body: Any, limit: int) -> Fields:
    """Raises Refusal: a field is missing, obsolete or out of its range; in the order that clients rely on."""
    body = body if isinstance(body, dict) else {}
    if "prompts" not in body:
        raise Refusal(400, "prompts is missing: a list of texts to continue")
    for old, new in (("max_len", "tokens_to_generate"), ("sentences", "prompts")):
        if old in body:
            raise Refusal(400, f"{old} is not used any more: use {new}")
    prompts = body["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refusal(400, "prompts must be a list of texts")
    if not prompts:
        raise Refusal(400, "prompts is empty: give at least one text")
    if len(prompts) > limit:
        raise Refusal(400, f"prompts has {len(prompts)} texts; at most {limit} are taken in one call")
    for name, check in CHECKS.items():
        wrong = check(body[name]) if name in body else None
        if wrong:
            raise Refusal(200, f"{name} {wrong}")
    values = DEFAULTS | {name: body[name] for name in CHECKS if name in body}
    _check_together(prompts, values)
    return Fields(prompts, values)


def _check_together(prompts: list[str], values: dict[str, Any]) -> None:
    rules = [
        (
            values["tokens_to_generate"] or values["logprobs"],
            "tokens_to_generate 0 only scores: it needs logprobs true",
        ),
        (not (values["top_k"] and values["top_p"]), "top_k and top_p exclude each other: give one of them"),
        (not values["top_p_decay"] or values["top_p"], "top_p_decay needs top_p above 0"),
        (not values["top_p_bound"] or values["top_p_bound"] <= values["top_p"], "top_p_bound must be at most top_p"),
        (values["add_BOS"] or all(prompts), "an empty prompt needs add_BOS true"),
        ("beam_width" not in values or len(prompts) == 1, "beam_width is for a single prompt"),
        ("beam_width" not in values, "beam_width: beam search is not built yet; leave it out"),
    ]
    for holds, message in rules:
        if not holds:
            raise Refusal(200, message)


def settings_of(fields: Fields, row: int) -> tuple[SamplingParams, list[str]]:
    """(how the row's tokens are drawn, texts that end it)."""
    values = fields.values
    stop = ["\n\n"] if values["stop_on_double_eol"] else []
    stop += ["\n"] if values["stop_on_eol"] else []
    params = SamplingParams(
        temperature=float(values["temperature"]),
        top_k=values["top_k"],
        top_p=values["top_p"],
        top_p_decay=values["top_p_decay"],
        top_p_bound=values["top_p_bound"],
        num_tokens_to_generate=values["tokens_to_generate"],
        return_log_probs=values["logprobs"],
        seed=values["random_seed"] + row if "random_seed" in values else None,
        stop_token_ids=(values["stop_token"],) if "stop_token" in values else (),
    )
    return params, stop


async def generate(service: Service, body: Any) -> dict[str, Any]:
    """{text, segments, tokens, logprobs}: a row for each prompt.

    Raises:
        Refusal: the call is not in order, or there is no room for it.
    """
    fields = read_fields(body, service.limits.prompts)
    if fields.values["prevent_newline_after_colon"]:
        raise Refusal(200, "prevent_newline_after_colon is not built; leave it out")
    rows = [service.tokens_of(prompt, fields.values["add_BOS"]) for prompt in fields.prompts]
    for row in rows:
        service.room(len(row), fields.values["tokens_to_generate"])
    tickets = service.tickets((row, *settings_of(fields, number)) for number, row in enumerate(rows))
    pieces = await asyncio.gather(*(ticket.whole() for ticket in tickets))
    tokens = [[*row, *piece.tokens] for row, piece in zip(rows, pieces)]
    answer: dict[str, Any] = {
        "text": [prompt + piece.text for prompt, piece in zip(fields.prompts, pieces)],
        "segments": [service.words(row)[0] for row in tokens],
        "tokens": tokens,
    }
    if fields.values["logprobs"]:
        answer["logprobs"] = [
            [
                json_safe(value)
                for value in [*((ticket.request and ticket.request.prompt_log_probs) or []), *piece.log_probs]
            ]
            for ticket, piece in zip(tickets, pieces)
        ]
    return answer
