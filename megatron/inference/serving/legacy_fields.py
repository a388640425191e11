"""The fields of PUT /api: their defaults, and what is wrong with a call, in the order that clients rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.inference.serving.service import Refusal

MOST_BEAMS = 128

Check = Callable[[Any, Mapping[str, Any]], str | None]
"""(value, all fields) -> what is wrong with it."""


@dataclass(frozen=True)
class Field:
    """What a field may be."""

    default: Any
    """None: there is none, and nothing is checked where the field is not given."""
    check: Check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _int(low: int | None = None, high: int | None = None) -> Check:
    words = "must be a whole number" + ("" if low is None else f" from {low}") + ("" if high is None else f" to {high}")

    def check(value: Any, fields: Mapping[str, Any]) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return words
        return None if (low is None or value >= low) and (high is None or value <= high) else words

    return check


def _bool(value: Any, fields: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _logprobs(value: Any, fields: Mapping[str, Any]) -> str | None:
    if wrong := _bool(value, fields):
        return wrong
    if not fields["tokens_to_generate"] and not value:
        return "must be true with tokens_to_generate 0, which only scores the prompts"
    return None


def _temperature(value: Any, fields: Mapping[str, Any]) -> str | None:
    return None if _is_number(value) and 0 < value <= 100 else "must be a number above 0, up to 100"


def _share(value: Any, fields: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, float) and 0 <= value <= 1 else "must be a number with a point, from 0.0 to 1.0"


def _top_p(value: Any, fields: Mapping[str, Any]) -> str | None:
    if wrong := _share(value, fields):
        return wrong
    return "and top_k exclude each other: give one of them" if value and fields["top_k"] else None


def _top_p_decay(value: Any, fields: Mapping[str, Any]) -> str | None:
    return _share(value, fields) or (None if fields["top_p"] else "needs top_p above 0.0")


def _top_p_bound(value: Any, fields: Mapping[str, Any]) -> str | None:
    if wrong := _share(value, fields):
        return wrong
    if not fields["top_p"]:
        return "needs top_p above 0.0"
    return None if 0 < value <= fields["top_p"] else f"must be above 0.0, up to top_p ({fields['top_p']})"


def _add_bos(value: Any, fields: Mapping[str, Any]) -> str | None:
    if wrong := _bool(value, fields):
        return wrong
    return None if value or all(fields["prompts"]) else "must be true for an empty prompt"


def _beam_width(value: Any, fields: Mapping[str, Any]) -> str | None:
    wrong = _int(1, MOST_BEAMS)(value, fields)
    return wrong or (None if len(fields["prompts"]) == 1 else "is for a single prompt")


def _length_penalty(value: Any, fields: Mapping[str, Any]) -> str | None:
    return None if isinstance(value, float) and abs(value) <= 100 else "must be a number with a point, -100.0 to 100.0"


FIELDS = {
    "tokens_to_generate": Field(64, _int(0)),
    "logprobs": Field(False, _logprobs),
    "temperature": Field(1.0, _temperature),
    "top_k": Field(0, _int(0, 1000)),
    "top_p": Field(0.0, _top_p),
    "top_p_decay": Field(None, _top_p_decay),
    "top_p_bound": Field(None, _top_p_bound),
    "add_BOS": Field(False, _add_bos),
    "stop_on_double_eol": Field(False, _bool),
    "stop_on_eol": Field(False, _bool),
    "prevent_newline_after_colon": Field(False, _bool),
    "random_seed": Field(None, _int(0, 2**62)),
    "no_log": Field(False, _bool),
    "beam_width": Field(None, _beam_width),
    "stop_token": Field(None, _int()),
    "length_penalty": Field(1.0, _length_penalty),
}
"""In the order they are checked."""


EXCLUDING = {"top_k": "top_p", "top_p": "top_k"}
"""A field -> the one whose default does not count where it is given."""


def read_fields(body: Any, most_prompts: int, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`prompts` and a value for each of `FIELDS`.

    Args:
        defaults: of some fields, instead of their own.

    Raises:
        Refusal: with status 400 what is wrong with the prompts, with 200 what is wrong with another field.
    """
    body = body if isinstance(body, dict) else {}
    prompts = _prompts(body, most_prompts)
    excluded = {other for name, other in EXCLUDING.items() if body.get(name)}
    known = {name: value for name, value in (defaults or {}).items() if name not in excluded}
    usual = {name: known.get(name, field.default) for name, field in FIELDS.items()}
    values = {name: body.get(name, usual[name]) for name in FIELDS} | {"prompts": prompts}
    for name, field in FIELDS.items():
        if name in body or usual[name] is not None:
            wrong = field.check(values[name], values)
            if wrong:
                raise Refusal(200, f"{name} {wrong}")
    return values


def _prompts(body: dict[str, Any], most: int) -> list[str]:
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
    if len(prompts) > most:
        raise Refusal(400, f"prompts has {len(prompts)} texts; at most {most} are taken in one call")
    return prompts
