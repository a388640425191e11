"""Random bodies over the server's own OpenAPI description: none gets a 5xx, none ends the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit_tests.inference.serving.test_app import with_server
from tests.worker_pool import run_ranks

pytest.importorskip("fastapi")
pytest.importorskip("hypothesis")

LEGACY = "tokens_to_generate logprobs temperature top_k top_p top_p_decay top_p_bound add_BOS stop_on_eol random_seed "
LEGACY += "stop_on_double_eol prevent_newline_after_colon beam_width stop_token length_penalty max_len sentences"


def fields_of(description: dict[str, Any], route: str) -> list[str]:
    """Names that the description knows for a route's body."""
    body = description["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(description["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"])


def fuzz(client: Any, service: Any, model: Any) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    plain = st.none() | st.booleans() | st.integers() | st.integers(0, 5) | st.floats() | st.floats(0, 1) | st.text()
    values = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    )
    prompts = st.text("0123456789", min_size=1, max_size=9)
    chat = prompts.map(lambda text: [{"role": "user", "content": text}])
    description = client.get("/openapi.json").json()
    routes = {
        "/completions": (fields_of(description, "/completions"), "prompt", prompts),
        "/v1/completions": (fields_of(description, "/v1/completions"), "prompt", prompts),
        "/v1/chat/completions": (fields_of(description, "/v1/chat/completions"), "messages", chat),
        "/api": (LEGACY.split(), "prompts", st.lists(prompts, max_size=2)),
    }
    for route, (names, first, good) in routes.items():
        fields = st.dictionaries(st.sampled_from(names), values, max_size=3)

        @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(fields, good, st.booleans(), st.just(route), st.just(first))
        def send(body: dict[str, Any], prompt: Any, is_good: bool, route: str, first: str) -> None:
            body = body | {first: prompt} if is_good else body
            method = client.put if route == "/api" else client.post
            answer = method(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (route, body, answer.text[:500])
            assert answer.status_code < 400 or len(answer.text) > 5

        send()
    assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_random_bodies_are_answered_or_refused() -> None:
    run_ranks(1, with_server, fuzz, timeout=1200)


def explore(client: Any, service: Any, model: Any) -> None:
    """Every operation of the description over a socket, with what it allows and with what it forbids."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error

    from megatron.inference.serving import http
    from megatron.inference.serving.app import build_app

    server = http.HttpServer(build_app(service), http.bind("127.0.0.1", 0))
    description = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    seen = set()
    for found in description.get_all_operations():
        operation = found.ok()
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            seen.add((operation.path, mode.value))

            @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                case.call_and_validate(checks=[not_a_server_error])

            send()
    server.close()
    assert {("/v1/completions", "negative"), ("/v1/chat/completions", "positive"), ("/api", "positive")} <= seen
    assert client.get("/health").status_code == 200


def explore_with_room() -> None:
    with_server(explore, max_waiting=10_000)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error() -> None:
    pytest.importorskip("schemathesis")
    run_ranks(1, explore_with_room, timeout=1200)
