"""Copies of a model behind one front: every request's answer is that of one copy alone, whichever has it."""

from __future__ import annotations

import socket
import threading
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core.inference.contexts import EncoderDecoderContext
from megatron.core.inference.sampling_params import SamplingParams
from tests.unit_tests.inference import test_encoder_decoder_context as encoder_decoder
from tests.unit_tests.inference.serving.test_app import Letters, texts_of
from tests.unit_tests.inference.small_models import LLAMA, build_engine, build_model
from tests.worker_pool import run_ranks

pytest.importorskip("fastapi")

PROMPTS = ["3141592653", "K", "CBA", "7"]


def gpt_engine(tp: int) -> Any:
    return build_engine(build_model(tp, **LLAMA), chunk_size=4)


def t5_engine(tp: int) -> Any:
    return encoder_decoder.build_engine(encoder_decoder.build_model("relative"))


def all_free(context: Any) -> bool:
    """Nothing is kept of texts that have ended."""
    if isinstance(context, EncoderDecoderContext):
        return context.written.num_bytes == context.encoded.num_bytes == 0
    allocator = context.chunk_allocator
    return allocator.chunk_count_avail + context.prefix_cache.num_spare == allocator.chunk_count_total - 1


def with_copies(check: Callable[[Any, Any], Any], tp: int = 1, make: Callable[[int], Any] = gpt_engine) -> Any:
    """On rank 0 `check(client, front)`, with an engine on each copy; nothing must be left behind on any."""
    from fastapi.testclient import TestClient

    from megatron.inference.serving.app import build_app
    from megatron.inference.serving.loop import STOPPED, EngineLoop
    from megatron.inference.serving.replicas import join_replicas
    from megatron.inference.serving.service import Service

    engine = make(tp)
    engine.controller.tokenizer = Letters()
    loop = EngineLoop(engine, max_waiting=8, heartbeat=0.2)
    front = join_replicas(loop)
    if torch.distributed.get_rank() > 0:
        loop.run()
    else:
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            with TestClient(build_app(Service(front, Letters(), "small")), raise_server_exceptions=False) as client:
                check(client, front)
        finally:
            front.stop()
            thread.join()
            front.end(STOPPED)
    torch.distributed.barrier()
    assert all_free(engine.context) and not loop.load
    return loop.counters.requests


def answers(client: Any, front: Any) -> None:
    """Those of the model alone, with log-probabilities, streamed or not, stopped or not."""
    body = {"prompts": PROMPTS, "tokens_to_generate": 6, "top_k": 1, "logprobs": True}
    together = client.put("/api", json=body).json()
    for row, prompt in enumerate(PROMPTS):  # one after the other, all go to the first copy
        alone = client.put("/api", json=body | {"prompts": [prompt]}).json()
        assert all(together[name][row] == alone[name][0] for name in ("text", "segments", "tokens"))
        assert together["logprobs"][row] == pytest.approx(alone["logprobs"][0], abs=1e-4)
    sampled = {"prompts": ["31"] * 4, "tokens_to_generate": 8, "random_seed": 3, "top_p": 0.9}
    first, second = (client.put("/api", json=sampled).json()["text"] for _ in range(2))
    assert first == second and len(set(first)) > 1
    details = {"prompt": ["31", "31"], "max_tokens": 5, "temperature": 0, "logprobs": 2, "echo": True}
    one, other = client.post("/v1/completions", json=details).json()["choices"]
    values, others = (choice["logprobs"]["token_logprobs"] for choice in (one, other))
    assert one["text"] == other["text"] and values[1:] == pytest.approx(others[1:], abs=1e-4)
    assert len(other["logprobs"]["top_logprobs"]) == 7
    stopping = {"prompt": ["31415", "31415"], "max_tokens": 6, "temperature": 0, "stop": together["text"][1][3]}
    for streamed in (False, True):
        assert client.post("/v1/completions", json=stopping | {"stream": streamed}).status_code == 200


def told_by_copy(client: Any, front: Any) -> None:
    """Health and numbers of each."""
    assert client.get("/health").json() == {"status": "ok", "replicas": [{"requests": 0}] * 2}
    client.put("/api", json={"prompts": PROMPTS, "tokens_to_generate": 6})
    told = client.get("/metrics").text
    for copy in range(2):
        assert f'megatron_requests_total{{replica="{copy}"}} 2\n' in told
        assert f'megatron_generated_tokens_total{{replica="{copy}"}} 12\n' in told
    assert told.count("# TYPE megatron_chunks_free gauge") == 1


@pytest.mark.parametrize("check", [answers, told_by_copy], ids=lambda check: check.__name__)
def test_copies_answer_as_one(check: Any) -> None:
    of_first, of_second = run_ranks(2, with_copies, check)
    assert of_first > 0 and of_second > 0


def test_copies_of_several_ranks_answer_as_one() -> None:
    counts = run_ranks(4, with_copies, answers, 2)
    assert counts[0] > 0 and counts[2] > 0 and counts[1] == counts[3] == 0


def greedy(client: Any, front: Any) -> None:
    model = front.engine.controller.inference_wrapped_model.chunks[0]
    found = client.put("/api", json={"prompts": PROMPTS, "tokens_to_generate": 6, "top_k": 1}).json()["text"]
    assert found == [prompt + text for prompt, text in zip(PROMPTS, texts_of(model, PROMPTS, 6))]


def test_each_copy_writes_what_the_model_writes() -> None:
    run_ranks(2, with_copies, greedy)


def of_t5(client: Any, front: Any) -> None:
    """Those of whole passes; three texts run on each copy, and three more wait."""
    model = front.engine.controller.inference_wrapped_model.model
    prompts = PROMPTS * 3
    body = {"prompts": prompts, "tokens_to_generate": encoder_decoder.NEW, "top_k": 1}
    letters = Letters()
    texts = [letters.detokenize(encoder_decoder.by_hand(model, letters.tokenize(prompt))) for prompt in PROMPTS]
    assert client.put("/api", json=body).json()["text"] == texts * 3


def test_copies_of_a_t5_answer_as_one() -> None:
    of_first, of_second = run_ranks(2, with_copies, of_t5, 1, t5_engine)
    assert of_first == of_second == 6


def unseeded(client: Any, front: Any) -> None:
    """Random texts follow the number of the request, not the copy or what else that has done."""
    ends: list[dict[int, Any]] = [{}, {}]
    params = SamplingParams(num_tokens_to_generate=8)
    for half in range(2):
        lock, done = threading.Lock(), threading.Event()

        def hear(item: Any, ended: dict[int, Any] = ends[half], lock: Any = lock, done: Any = done) -> None:
            with lock:
                if item.reason is not None:
                    ended[item.request.request_id] = item.tokens
                    if len(ended) == 4:
                        done.set()

        assert [front.submit([3, 1], params, hear) for _ in range(4)] == list(range(4 * half, 4 * half + 4))
        done.wait()
    engine = build_engine(front.engine.controller.inference_wrapped_model.chunks[0], chunk_size=4)
    for number in range(8):
        engine.add_request(number, [3, 1], sampling_params=params)
    found = ends[0] | ends[1]
    expected = [engine.requests[number] for number in range(8)]
    while engine.has_unfinished_requests():
        engine.step()
    assert [list(found[number]) for number in range(8)] == [request.generated_tokens for request in expected]


def test_random_texts_follow_the_number_of_the_request() -> None:
    run_ranks(2, with_copies, unseeded)


def cancels(client: Any, front: Any) -> None:
    heard: list[Any] = []
    both = [threading.Event() for _ in range(2)]
    for event in both:

        def hear(item: Any, event: threading.Event = event) -> None:
            heard.append(item)
            if item.reason is not None:
                event.set()

        front.cancel(front.submit([1, 2], SamplingParams(num_tokens_to_generate=40), hear))
    for event in both:
        event.wait()
    assert sum(item.reason is not None for item in heard) == 2
    front.cancel(10**6)
    assert front.loads() == [0, 0] and not front._owners


def test_cancelled_requests_leave_nothing_on_any_copy() -> None:
    run_ranks(2, with_copies, cancels)


def refuse_what_is_too_much() -> list[int]:
    """Nobody computes, so that all requests wait; how many each copy was given, as rank 0 knows it."""
    from megatron.inference.serving.loop import STOPPED, EngineLoop, Overloaded
    from megatron.inference.serving.replicas import join_replicas

    loop = EngineLoop(build_engine(build_model(**LLAMA)), max_waiting=2)
    front = join_replicas(loop)
    loads: list[int] = []
    if torch.distributed.get_rank() == 0:
        for _ in range(4):
            front.submit([1, 2], SamplingParams(), lambda item: None)
        with pytest.raises(Overloaded):
            front.submit([1, 2], SamplingParams(), lambda item: None)
        loads = front.loads()
        rejected = [samples["requests_rejected_total"] for samples in front.samples()]
        assert sum(rejected) == 1
        front.end(STOPPED)
    torch.distributed.barrier()
    return loads


def test_requests_go_where_the_fewest_are() -> None:
    assert run_ranks(2, refuse_what_is_too_much)[0] == [2, 2]


def lose_the_other() -> str:
    """What ends the loop of a rank whose peer has closed the connection."""
    from megatron.inference.serving.loop import EngineGone, EngineLoop
    from megatron.inference.serving.replicas import join_replicas

    loop = EngineLoop(build_engine(build_model(**LLAMA)), heartbeat=0.2)
    connections: list[socket.socket] = []
    connect = socket.create_connection

    def keep(*args: Any, **settings: Any) -> socket.socket:
        connections.append(connect(*args, **settings))
        return connections[0]

    with mock.patch.object(socket, "create_connection", keep):
        front = join_replicas(loop)
    heard: list[Any] = []
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        for _ in range(2):
            front.submit([1, 2], SamplingParams(), heard.append)
    torch.distributed.barrier()
    if not is_first:
        connections[0].shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionError) as lost:
        loop.run()
    if is_first:
        assert any(isinstance(item, EngineGone) for item in heard) and isinstance(front.gone, EngineGone)
        with pytest.raises(EngineGone, match="stopped working"):
            front.submit([1, 2], SamplingParams(), heard.append)
    return str(lost.value)


def test_a_lost_copy_ends_all() -> None:
    first, second = run_ranks(2, lose_the_other)
    assert first == "Connection closed by replica 1 (rank 1)" and second == "Connection closed by rank 0"


@pytest.mark.parametrize(
    "tp, ep, etp, fits", [(1, 1, 1, True), (2, 1, 2, True), (4, 2, 2, True), (2, 2, 1, True), (2, 2, 2, False)]
)
def test_copies_that_share_experts_are_refused(tp: int, ep: int, etp: int, fits: bool) -> None:
    from tools.run_text_generation_server import check_replicas

    args = Namespace(
        world_size=8,
        data_parallel_size=8 // tp,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    with nullcontext() if fits else pytest.raises(ValueError, match="copies of the model, which share experts"):
        check_replicas(args)
