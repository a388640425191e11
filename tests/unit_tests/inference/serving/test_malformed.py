"""Bodies that no client should send: each is refused with a reason, none ends the engine or leaves anything behind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit_tests.inference.serving.test_app import with_server
from tests.worker_pool import run_ranks

pytest.importorskip("fastapi")

RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b"\xff\xfe\x00",
    b'{"prompt": "\xc3\x28", "max_tokens": 1}',
    b'{"prompt": "31", "temperature": NaN}',
    b'{"prompt": "31", "temperature": -Infinity}',
    b'{"prompt": "31", "top_p": 1e999}',
    b'{"prompt": "31", "max_tokens": 1e400}',
    b'{"prompt": "31", "prompt": []}',
    b"[" * 15_000,
    b'{"a":' * 3_000,
]
WRONG: list[dict[str, Any]] = [
    {"prompt": None},
    {"prompt": 3},
    {"prompt": [[]]},
    {"prompt": [["a"]]},
    {"prompt": ["31", 4]},
    {"prompt": [-1]},
    {"prompt": [10**30]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": "\ud800"},
    {"prompt": "\x00"},
    {"prompt": "1" * 19_000},
    {"prompt": [1] * 4_000},
    {"prompt": ["1"] * 4_000},
    {"prompt": "31", "max_tokens": -1},
    {"prompt": "31", "max_tokens": 10**30},
    {"prompt": "31", "max_tokens": "3"},
    {"prompt": "31", "max_tokens": 2.5},
    {"prompt": "31", "temperature": -0.1},
    {"prompt": "31", "temperature": 1e300},
    {"prompt": "31", "top_p": 1.01},
    {"prompt": "31", "top_k": -1},
    {"prompt": "31", "min_p": -1},
    {"prompt": "31", "repetition_penalty": 0},
    {"prompt": "31", "repetition_penalty": 1e-30},
    {"prompt": "31", "seed": -1},
    {"prompt": "31", "seed": 2**64},
    {"prompt": "31", "n": 0},
    {"prompt": "31", "n": 10**9},
    {"prompt": "31", "stop": 3},
    {"prompt": "31", "stop": [1]},
    {"prompt": "31", "logprobs": 10**6},
    {"prompt": "31", "model": 3},
    {"prompt": "31", "stream": "perhaps"},
    {"prompt": "31", "stream_options": []},
    {"messages": "31"},
    {"messages": [{"role": "king", "content": "31"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": {"a": 1}}]},
    {"messages": [{"role": "user", "content": "é" * 9_000}]},
]
EDGES: list[dict[str, Any]] = [
    {"prompt": "31", "temperature": 1e-300, "top_p": 0.5},
    {"prompt": "31", "temperature": 100, "top_p": 1e-12},
    {"prompt": "31", "temperature": 5e-324, "min_p": 1, "repetition_penalty": 100},
    {"prompt": "31", "top_k": 10**9},
    {"prompt": "31", "logprobs": 20},
    {"prompt": "31", "seed": 2**63 - 1},
    {"prompt": "31", "stop": ["", "9"]},
]


def send(client: Any, service: Any, model: Any) -> None:
    for route in ("/v1/completions", "/v1/chat/completions", "/completions"):
        for body in [*RAW, *map(encoded, WRONG)]:
            answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
            assert 400 <= answer.status_code < 500, (route, body[:80], answer.status_code, answer.text[:300])
            assert len(answer.json()["error"]["message"]) > 5, (route, body[:80])
    for body in [*RAW, *map(encoded, WRONG)]:
        answer = client.put("/api", content=body)
        assert 400 <= answer.status_code < 500 and len(answer.json()) > 5, (body[:80], answer.text[:300])
    for body in EDGES:
        answer = client.post("/v1/completions", json=body | {"max_tokens": 3})
        assert answer.status_code == 200, (body, answer.text)
    legacy = {"prompts": ["31"], "tokens_to_generate": 3, "temperature": 1e-300, "top_p": 0.5, "top_p_decay": 0.0}
    assert client.put("/api", json=legacy).json()["text"][0].startswith("31")
    for name in ("tokens_to_generate", "top_k", "random_seed", "beam_width", "stop_token"):
        for value in (-(10**30), "1", None, [], 1.5, 10**30):
            answer = client.put("/api", json={"prompts": ["31"], "tokens_to_generate": 3, name: value})
            assert answer.status_code < 500, (name, value, answer.text)
    assert client.get("/health").status_code == 200


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def test_malformed_bodies_are_refused_with_a_reason() -> None:
    run_ranks(1, with_server, send)
