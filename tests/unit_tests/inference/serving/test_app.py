"""The routes over a small model: what they answer, what they refuse, and that the engine is left clean."""

from __future__ import annotations

import argparse
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.inference.sampling_params import SamplingParams
from tests.unit_tests.inference.small_models import (
    LLAMA,
    VOCAB_SIZE,
    build_engine,
    build_model,
    greedy_by_hand,
    whole_logits,
)
from tests.worker_pool import run_ranks

pytest.importorskip("fastapi")

from megatron.inference.text_generation_server import defaults_of_calls


class Letters:
    """A tokenizer of one token a character."""

    eod, bos = 0, 1

    def tokenize(self, text: str) -> list[int]:
        tokens = [ord(letter) - ord("0") for letter in text]
        if not all(0 <= token < VOCAB_SIZE for token in tokens):
            raise ValueError("a letter outside the vocabulary")
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        return "".join(chr(token + ord("0")) for token in tokens)


def with_server(check: Callable[[Any, Any, Any], Any], **settings: Any) -> Any:
    """What `check(client, service, model)` gives, with the engine running beside it; nothing must be left behind."""
    from fastapi.testclient import TestClient

    from megatron.inference.serving.app import build_app
    from megatron.inference.serving.loop import EngineLoop
    from megatron.inference.serving.service import Limits, Service

    model = build_model(**LLAMA)
    engine = build_engine(model)
    engine.controller.tokenizer = Letters()
    loop = EngineLoop(engine, max_waiting=settings.pop("max_waiting", 8), heartbeat=0.2)
    limits = Limits(body_bytes=20_000, prompts=4)
    chat = settings.pop("chat", lambda messages: Letters().tokenize(messages[-1]["content"]))
    service = Service(loop, Letters(), "small", chat, settings.pop("api_key", None), limits)
    thread = threading.Thread(target=loop.run)
    if settings.pop("starts", True):
        thread.start()
    try:
        with TestClient(build_app(service), raise_server_exceptions=False) as client:
            return check(client, service, model)
    finally:
        loop.stop()
        if thread.ident is not None:
            thread.join()
            allocator = engine.context.chunk_allocator
            free = allocator.chunk_count_avail + engine.context.prefix_cache.num_spare
            assert free == allocator.chunk_count_total - 1 and not loop._listeners


PROMPTS = ["3141592653", "K", "abc"[::-1].upper()]


def texts_of(model: Any, prompts: list[str], count: int) -> list[str]:
    letters = Letters()
    return [letters.detokenize(greedy_by_hand(model, letters.tokenize(prompt), count)) for prompt in prompts]


def legacy_answers(client: Any, service: Any, model: Any) -> None:
    body = {"prompts": PROMPTS, "tokens_to_generate": 6, "top_k": 1, "logprobs": True}
    answer = client.put("/api", json=body)
    assert answer.status_code == 200
    found, letters = answer.json(), Letters()
    assert found["text"] == [prompt + text for prompt, text in zip(PROMPTS, texts_of(model, PROMPTS, 6))]
    assert found["tokens"] == [letters.tokenize(text) for text in found["text"]]
    assert found["segments"] == [list(text) for text in found["text"]]
    for tokens, values in zip(found["tokens"], found["logprobs"]):
        table = whole_logits(model, tokens).log_softmax(-1)[:-1]
        expected = table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)
    scored = client.put("/api", json={"prompts": ["314"], "tokens_to_generate": 0, "logprobs": True}).json()
    assert scored["text"] == ["314"] and len(scored["logprobs"][0]) == 2
    sampled = {"prompts": ["31"] * 2, "tokens_to_generate": 8, "random_seed": 3, "top_p": 0.9}
    first, second = (client.put("/api", json=sampled).json()["text"] for _ in range(2))
    assert first == second and first[0] != first[1]


def legacy_beams(client: Any, service: Any, model: Any) -> None:
    body = {"prompts": ["3141"], "tokens_to_generate": 4, "beam_width": 3, "stop_token": 49, "length_penalty": 0.0}
    found, letters = client.put("/api", json=body).json(), Letters()
    assert found["segments"] == [list(text) for text in found["text"]] and len(found["text"]) == 3
    for text, score in zip(found["text"], found["scores"]):
        tokens = letters.tokenize(text)
        table = whole_logits(model, tokens).log_softmax(-1)
        total = sum(float(table[place - 1, tokens[place]]) for place in range(4, len(tokens)))
        total += float(table[-1, 49]) if len(tokens) < 8 else 0.0
        assert abs(total - score) < 1e-3
    assert found["scores"] == sorted(found["scores"], reverse=True)
    nothing = client.put("/api", json=body | {"tokens_to_generate": 0, "logprobs": True}).json()
    assert nothing["text"] == ["3141"]


def newline_after_colon(client: Any, service: Any, model: Any) -> None:
    """A newline is what the model would write, and is not written if it may not be."""
    (newline,) = texts_of(model, ["318"], 1)

    class Lines(Letters):
        def tokenize(self, text: str) -> list[int]:
            return super().tokenize(text.replace("\n", newline).replace(":", "8"))

    service.tokenizer = Lines()
    for way in ({"top_k": 1}, {"temperature": 0.01, "random_seed": 1}, {"beam_width": 2}):
        for forbids in (False, True):
            body = {"prompts": ["31:"], "tokens_to_generate": 1, "prevent_newline_after_colon": forbids, **way}
            text = client.put("/api", json=body).json()["text"][0]
            assert (text[-1] == newline) is not forbids, (text, body)


def logged(client: Any, service: Any, model: Any) -> None:
    """Who asks for what is logged, unless the client does not want it."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("megatron.inference.serving.legacy_api")
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    try:
        body = {"prompts": ["31"], "tokens_to_generate": 1}
        client.put("/api", json=body | {"no_log": True})
        assert not heard
        client.put("/api", json=body)
        assert json.dumps(body) in heard[0] and heard[0].startswith("request IP: testclient")
    finally:
        logger.removeHandler(ear)


BAD_LEGACY = [
    ({}, 400, "prompts is missing"),
    ({"prompts": ["1"], "max_len": 3}, 400, "tokens_to_generate"),
    ({"sentences": ["1"], "prompts": ["1"]}, 400, "use prompts"),
    ({"prompts": "1"}, 400, "list of texts"),
    ({"prompts": []}, 400, "empty"),
    ({"prompts": ["1"] * 5}, 400, "at most 4"),
    ({"prompts": ["1"], "tokens_to_generate": -1}, 200, "tokens_to_generate"),
    ({"prompts": ["1"], "tokens_to_generate": True}, 200, "tokens_to_generate"),
    ({"prompts": ["1"], "tokens_to_generate": 0}, 200, "logprobs"),
    ({"prompts": ["1"], "temperature": 0}, 200, "temperature"),
    ({"prompts": ["1"], "top_k": 1001}, 200, "top_k"),
    ({"prompts": ["1"], "top_p": 1}, 200, "top_p"),
    ({"prompts": ["1"], "top_p": 0.5, "top_k": 2}, 200, "exclude"),
    ({"prompts": ["1"], "top_p_decay": 0.5}, 200, "top_p_decay"),
    ({"prompts": ["1"], "top_p": 0.5, "top_p_bound": 0.6}, 200, "top_p_bound"),
    ({"prompts": [""]}, 200, "add_BOS"),
    ({"prompts": ["1"], "random_seed": -2}, 200, "random_seed"),
    ({"prompts": ["1", "2"], "beam_width": 2}, 200, "beam_width"),
    ({"prompts": ["1"], "beam_width": 0}, 200, "beam_width"),
    ({"prompts": ["1"], "beam_width": 129}, 200, "beam_width"),
    ({"prompts": ["1"], "length_penalty": 1}, 200, "length_penalty"),
    ({"prompts": ["1"], "stop_token": "1"}, 200, "stop_token"),
    ({"prompts": ["1"], "no_log": 0}, 200, "no_log"),
    ({"prompts": ["1"], "prevent_newline_after_colon": None}, 200, "prevent_newline_after_colon"),
    ({"prompts": ["1"], "top_p_decay": 0.0}, 200, "top_p_decay needs"),
    ({"prompts": ["1"], "top_p": 0.5, "top_p_bound": 0.0}, 200, "top_p_bound must be above"),
    ({"prompts": ["1"], "random_seed": None}, 200, "random_seed"),
    ({"prompts": ["~"]}, 200, "cannot be tokenized"),
    ({"prompts": ["1"], "tokens_to_generate": 1000}, 200, "at most 48 tokens"),
    ({"prompts": ["1" * 49], "tokens_to_generate": 1}, 200, "49 tokens"),
    ([1], 400, "prompts is missing"),
]


def legacy_refusals(client: Any, service: Any, model: Any) -> None:
    for body, status, words in BAD_LEGACY:
        answer = client.put("/api", json=body)
        assert answer.status_code == status and words in answer.json(), (body, answer.text)
    assert client.put("/api", content=b"{").status_code == 400
    assert client.put("/api", content=b"\xff\xfe").status_code == 400
    assert client.put("/api", content=b"[" * 19_000).status_code == 400
    assert client.put("/api", content=b"[" * 30_000).status_code == 413
    assert client.post("/api", json={}).status_code == 405


def defaults_of_flags(client: Any, service: Any, model: Any) -> None:
    """They stand in for what a call does not say."""
    flags = argparse.Namespace(top_k=1, num_tokens_to_generate=5, return_log_probs=True, temperature=None)
    service.defaults = defaults_of_calls(flags)
    found = client.put("/api", json={"prompts": ["314"]}).json()
    assert found["text"] == ["314" + texts_of(model, ["314"], 5)[0]] and len(found["logprobs"][0]) == 7
    said = {"prompts": ["314"], "tokens_to_generate": 2, "top_p": 0.5, "logprobs": False}
    assert len(client.put("/api", json=said).json()["text"][0]) == 5
    with pytest.raises(ValueError, match="--top_k 1 --top_p 0.5: no call could be answered: top_p and top_k exclude"):
        defaults_of_calls(argparse.Namespace(top_k=1, top_p=0.5))


def completions(client: Any, service: Any, model: Any) -> None:
    (text,) = texts_of(model, ["31415"], 6)
    body = {"prompt": "31415", "max_tokens": 6, "temperature": 0}
    for route in ("/completions", "/v1/completions"):
        assert client.post(route, json=body).json()["choices"][0]["text"] == text
        assert client.post(route, json=body | {"echo": True}).json()["choices"][0]["text"] == "31415" + text
        stopped = client.post(route, json=body | {"stop": text[2:4]}).json()["choices"][0]["text"]
        assert stopped == text[: text.index(text[2:4])]
    scored = client.post("/completions", json={"prompt": "314", "max_tokens": 0, "echo": True, "logprobs": 2}).json()
    told = scored["choices"][0]["logprobs"]
    assert told["tokens"] == list("314") and told["text_offset"] == [0, 1, 2]
    assert told["token_logprobs"][0] is None and len(told["top_logprobs"][1]) == 2
    many = client.post("/v1/completions", json=body | {"prompt": ["31", "314"], "n": 2, "logprobs": 1}).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == many["choices"][1]["text"] == texts_of(model, ["31"], 6)[0]
    assert many["usage"] == {"prompt_tokens": 10, "completion_tokens": 24, "total_tokens": 34}
    assert many["choices"][0]["finish_reason"] == "length"
    assert len(many["choices"][2]["logprobs"]["top_logprobs"]) == 6


def streams(client: Any, service: Any, model: Any) -> None:
    (text,) = texts_of(model, ["31415"], 6)
    chat = {"messages": [{"role": "user", "content": "31415"}], "max_tokens": 6, "temperature": 0, "stream": True}
    lines = [line for line in client.post("/v1/chat/completions", json=chat).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and len(chunks) == 6
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    body = {"prompt": "31415", "max_tokens": 6, "temperature": 0, "stream": True, "stop": text[3:5], "n": 2}
    body["stream_options"] = {"include_usage": True}
    lines = [line for line in client.post("/v1/completions", json=body).text.split("\n\n") if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    for index in range(2):
        pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(pieces) == text[: text.index(text[3:5])]
    assert chunks[-1]["usage"]["prompt_tokens"] == 10


def streamed_log_probs(client: Any, service: Any, model: Any) -> None:
    """Those of the whole answer; tokens whose text is held back, as it may begin a stop text, are told of later."""
    (text,) = texts_of(model, ["31415"], 6)
    body = {"prompt": "31415", "max_tokens": 6, "temperature": 0, "logprobs": 2, "stop": text[2:4] + "!"}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")[:-2]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert whole["text"] == text == "".join(choice["text"] for choice in choices)
    assert len(choices) < 6
    for name, told in whole["logprobs"].items():
        assert told == [one for choice in choices for one in choice["logprobs"][name]] and len(told) == 6
    for count in (6, 0):
        scored = body | {"echo": True, "n": 2, "max_tokens": count}
        whole = client.post("/v1/completions", json=scored).json()["choices"]
        lines = client.post("/v1/completions", json=scored | {"stream": True}).text.split("\n\n")[:-2]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        for index in range(2):
            own = [choice for choice in choices if choice["index"] == index]
            assert whole[index]["text"] == "31415" + text[:count] == "".join(choice["text"] for choice in own)
            for name, told in whole[index]["logprobs"].items():
                assert told == [one for choice in own for one in choice["logprobs"][name]] and len(told) == 5 + count
            assert own[0]["logprobs"]["token_logprobs"][0] is None and own[0]["logprobs"]["top_logprobs"][0] is None


def page(client: Any, service: Any, model: Any) -> None:
    for address in ("/", "/index.html"):
        answer = client.get(address)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"https?://|//[a-z]+\.|@import|<link[^>]+stylesheet|src=", answer.text)


BAD_OPENAI = [
    ({"prompt": "31", "temperature": -1}, "temperature"),
    ({"prompt": "31", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "31", "max_tokens": 4000}, "at most 48 tokens"),
    ({"prompt": "31", "unknown": 1}, "unknown"),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "empty"),
    ({"prompt": [VOCAB_SIZE]}, "vocabulary"),
    ({"prompt": "31", "n": 100}, "n"),
    ({"prompt": "31", "top_p": "x"}, "top_p"),
    ({}, "prompt"),
]


def openai_refusals(client: Any, service: Any, model: Any) -> None:
    for body, words in BAD_OPENAI:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], (body, answer.text)
    for route in ("/completions", "/v1/completions"):
        answer = client.post(route, json={"prompt": ["31", "3" * 47], "max_tokens": 9})
        assert answer.status_code == 400 and service.loop.counters.requests == 0, "a part of a refused call was begun"
    assert client.post("/v1/completions", content=b'{"prompt": "31", "temperature": NaN}').status_code == 400
    assert client.post("/v1/completions", json={"prompt": "31", "model": "other"}).status_code == 404
    chat = {"messages": [{"role": "user", "content": "31"}]}
    assert client.post("/v1/chat/completions", json=chat | {"top_logprobs": 2}).status_code == 400
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    service.chat_template = None
    assert "no chat template" in client.post("/v1/chat/completions", json=chat).json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "small"
    assert client.get("/health").json() == {"status": "ok"}
    assert "megatron_requests_rejected_total 0" in client.get("/metrics").text


ROUTES = [
    legacy_answers,
    legacy_beams,
    newline_after_colon,
    logged,
    legacy_refusals,
    defaults_of_flags,
    completions,
    streams,
    streamed_log_probs,
    page,
    openai_refusals,
]


@pytest.mark.parametrize("check", ROUTES, ids=lambda check: check.__name__)
def test_routes(check: Any) -> None:
    run_ranks(1, with_server, check)


def keyed(client: Any, service: Any, model: Any) -> None:
    assert client.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.put("/api", json={"prompts": ["1"]}, headers=headers).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def ask_for_a_key() -> None:
    with_server(keyed, api_key="secret")


def test_a_key_is_asked_for() -> None:
    run_ranks(1, ask_for_a_key)


def overloaded(client: Any, service: Any, model: Any) -> None:
    for _ in range(2):
        service.loop.submit([1, 2], SamplingParams(), lambda progress: None)
    answer = client.put("/api", json={"prompts": ["1"], "tokens_to_generate": 5})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert client.get("/health").status_code == 200
    object.__setattr__(service.limits, "connections", 0)
    for answer in (client.put("/api", json={"prompts": ["1"]}), client.get("/v1/models")):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and "0 calls" in answer.text


def broken(client: Any, service: Any, model: Any) -> None:
    """What went wrong is for the log; clients that wait, and those that come later, hear that it did."""

    def step() -> None:
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer [127.0.0.1]:12345")

    service.loop.engine.step = step
    raised: list[str] = []

    def run() -> None:
        try:
            service.loop.run()
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(2):
        for route, body in (("/v1/completions", {"prompt": "1"}), ("/completions", {"prompt": "1", "max_tokens": 1})):
            answer = client.post(route, json=body)
            assert answer.status_code == 503 and "stopped working" in answer.json()["error"]["message"]
            assert "gloo" not in answer.text
    answer = client.put("/api", json={"prompts": ["1"], "tokens_to_generate": 3})
    assert answer.status_code == 503 and "stopped working" in answer.json()
    assert client.get("/health").status_code == 503 and "gloo" not in client.get("/health").text
    assert client.get("/metrics").status_code == 200
    thread.join()
    assert "gloo" in raised[0]


def overload() -> None:
    with_server(overloaded, max_waiting=2, starts=False)


def test_too_many_are_told_when_to_come_back() -> None:
    run_ranks(1, overload)


def breaks() -> None:
    with_server(broken, starts=False)


def test_a_broken_engine_is_told_without_its_error() -> None:
    run_ranks(1, breaks)


def cancels(client: Any, service: Any, model: Any) -> None:
    heard: list[Any] = []
    number = service.loop.submit([1, 2], SamplingParams(num_tokens_to_generate=40), heard.append)
    service.loop.cancel(number)
    while not heard or heard[-1].reason is None:
        time.sleep(0.01)
    assert heard[-1].reason.value in ("cancelled", "length")


def test_a_cancelled_request_leaves_nothing() -> None:
    run_ranks(1, with_server, cancels)
