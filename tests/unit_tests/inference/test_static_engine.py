"""Batches whose rows all are at the same position give the same texts as the dynamic engine and the whole model."""

from __future__ import annotations

import asyncio
import functools

import pytest
import torch

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_model import GPTModel
from tests.unit_tests.inference.small_models import (
    LLAMA,
    MAX_LENGTH,
    PADDED_VOCAB_SIZE,
    Words,
    build_model,
    greedy_by_hand,
    whole_logits,
)
from tests.worker_pool import run_ranks

PROMPTS = ["3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3", "27", "31 41 5", "3 1 4 1"]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=14, ignore_termination=True)


def build_engine(model: GPTModel, max_batch_size: int | None = None, threshold: int = -1) -> StaticInferenceEngine:
    config = InferenceWrapperConfig(
        model.config.hidden_size,
        torch.float32,
        threshold,
        PADDED_VOCAB_SIZE,
        inference_max_requests=4,
        inference_max_seq_length=MAX_LENGTH,
    )
    wrapper = GPTInferenceWrapper(model, config)
    assert isinstance(wrapper.inference_params, StaticInferenceContext)
    return MCoreEngine(TextGenerationController(wrapper, Words()), max_batch_size)


def texts(layout: tuple, settings: dict, params: SamplingParams, **engine: int) -> list:
    requests = build_engine(build_model(*layout, **settings), **engine).generate(PROMPTS, sampling_params=params)
    assert all(request.status is Status.COMPLETED for request in requests)
    return [request.generated_tokens.tolist() for request in requests]


def in_pieces(layout: tuple, settings: dict, params: SamplingParams) -> list:
    return texts(layout, settings, params, threshold=1)


def two_at_a_time(layout: tuple, settings: dict, params: SamplingParams) -> list:
    return texts(layout, settings, params, max_batch_size=2)


def by_hand(settings: dict) -> list:
    model = build_model(**settings)
    return [greedy_by_hand(model, Words().tokenize(prompt), GREEDY.num_tokens_to_generate) for prompt in PROMPTS]


SETTINGS = {"learned positions": {}, "llama with a window": LLAMA | {"window_size": (6, 0)}}


@functools.cache
def expected(kind: str) -> list:
    return run_ranks(1, by_hand, SETTINGS[kind])[0]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "layout, run",
    [
        ((1, 1), texts),
        ((1, 1), two_at_a_time),
        ((2, 1, True), texts),
        ((1, 2), texts),
        ((1, 2), in_pieces),
        ((2, 2, True), in_pieces),
    ],
)
def test_greedy_text_is_that_of_the_whole_model(kind: str, layout: tuple, run: object) -> None:
    for found in run_ranks(layout[0] * layout[1], run, layout, SETTINGS[kind], GREEDY):
        assert found == expected(kind)


def everything_told(layout: tuple) -> list[InferenceRequest]:
    params = SamplingParams(
        top_k=1,
        num_tokens_to_generate=5,
        return_log_probs=True,
        return_segments=True,
        top_n_logprobs=2,
        return_prompt_top_n_logprobs=True,
        ignore_termination=True,
    )
    return build_engine(build_model(*layout, **LLAMA)).generate(PROMPTS, sampling_params=params)


def logits_of(tokens: list[int]) -> torch.Tensor:
    return whole_logits(build_model(**LLAMA), tokens)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2, True)])
def test_log_probabilities_are_those_of_a_full_pass(layout: tuple) -> None:
    for request, prompt in zip(run_ranks(layout[0] * layout[1], everything_told, layout)[0], PROMPTS):
        tokens = [*Words().tokenize(prompt), *request.generated_tokens.tolist()]
        table = run_ranks(1, logits_of, tokens)[0].log_softmax(-1)[:-1]
        values = table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        found = torch.cat((request.prompt_log_probs, request.generated_log_probs))
        torch.testing.assert_close(found, values, atol=1e-4, rtol=0)
        assert len(request.generated_log_probs) == request.generated_length == 5
        best = table.topk(2).indices.tolist()
        told = request.prompt_top_n_logprobs + request.generated_top_n_logprobs
        assert [list(row) for row in told] == [[str(token) for token in row] for row in best]
        assert request.segments == [str(token) for token in tokens]
        assert request.generated_text == " ".join(request.generated_segments)


def endings() -> None:
    model = build_model(**LLAMA)
    engine = build_engine(model)
    text = greedy_by_hand(model, [27], 14)
    engine.controller.tokenizer.eod = text[3]
    first = text.index(text[3])
    (request,) = engine.generate(["27"], sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=14))
    assert request.generated_tokens.tolist() == text[:first]  # the token that ends it is not counted
    stops = SamplingParams(top_k=1, num_tokens_to_generate=14, stop_token_ids=(text[0],))
    (request,) = engine.generate(
        inference_requests=[InferenceRequest(request_id="x", prompt="27", sampling_params=stops)]
    )
    assert request.generated_tokens.tolist() == text[:1]
    scored = SamplingParams(top_k=1, num_tokens_to_generate=0, return_log_probs=True)
    (request,) = engine.generate(["3 1 4"], common_inference_params=scored)
    assert request.generated_length == 0 and len(request.prompt_log_probs) == 2
    with pytest.raises(ValueError, match="has room for 4 of 48 tokens"):
        engine.generate(["1 2 3"], sampling_params=SamplingParams(num_tokens_to_generate=46))
    assert not engine.scheduler.have_requests_pending()


def test_a_text_ends_where_it_should() -> None:
    run_ranks(1, endings)


async def streamed(engine: StaticInferenceEngine) -> list[list[int]]:
    number = engine.add_request("27", sampling_params=GREEDY, streaming=True)
    stream = engine.get_stream_generator(number)
    assert stream is not None and engine.get_stream_generator("99") is None
    running = asyncio.create_task(engine.run_engine_async())
    seen = [request.generated_tokens.tolist() async for request in stream]
    await running
    return seen


def stream_tokens() -> tuple[list, list]:
    model = build_model(**LLAMA)
    return asyncio.run(streamed(build_engine(model))), greedy_by_hand(model, [27], 14)


def test_a_stream_shows_each_token() -> None:
    seen, text = run_ranks(1, stream_tokens)[0]
    assert seen == [text[: length + 1] for length in range(14)]


def swapped_rows() -> None:
    context = StaticInferenceContext(3, 8)
    keys = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 1, 4)
    context.attend(1, keys, keys, keys, 1.0)
    context.swap_key_value_dict([2, 2, 0])
    for memory in context.key_value_memory_dict[1]:
        assert memory[:, 0, 0, 0].tolist() == [2.0, 2.0, 0.0]


def test_rows_can_go_on_from_others() -> None:
    run_ranks(1, swapped_rows)
