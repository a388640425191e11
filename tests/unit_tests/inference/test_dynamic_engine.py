"""Continuous batching: every text is what the whole model gives for it alone, however the engine packs it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron.core.inference.contexts import MaxSequenceLengthOverflowError
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import FinishReason, Status
from megatron.core.inference.sampling_params import SamplingParams
from tests.unit_tests.inference.small_models import (
    LATENT,
    LLAMA,
    MAX_LENGTH,
    VOCAB_SIZE,
    build_engine,
    build_model,
    greedy_by_hand,
    whole_logits,
)
from tests.worker_pool import run_ranks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [27], [31, 41, 5], [3, 1, 4, 1, 5, 9, 2, 6, 11]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=20)


def all_free(engine: DynamicInferenceEngine) -> bool:
    """No text holds a chunk: each is free, or only the cache of beginnings has it."""
    allocator = engine.context.chunk_allocator
    return allocator.chunk_count_avail + engine.context.prefix_cache.num_spare == allocator.chunk_count_total - 1


def continuations(layout: tuple, settings: dict, params: SamplingParams, prompts: list, context: dict) -> list:
    engine = build_engine(build_model(*layout, **settings), **context)
    requests = engine.generate(prompts, params)
    assert all_free(engine) and not engine.context.sequences
    assert all(request.status is Status.COMPLETED for request in requests)
    return [request.generated_tokens for request in requests]


def by_hand(settings: dict, prompts: list, num_tokens: int) -> list:
    model = build_model(**settings)
    return [greedy_by_hand(model, prompt, num_tokens) for prompt in prompts]


@functools.cache
def expected(kind: str) -> list:
    return run_ranks(1, by_hand, SETTINGS[kind], PROMPTS, 20)[0]


SETTINGS = {
    "learned positions": {},
    "llama": LLAMA,
    "window": LLAMA | {"window_size": (6, 0)},
}
CONTEXTS = {
    "one chunk each": {"chunk_size": 64, "chunks": 8},
    "many chunks": {"chunk_size": 4},
    "prompts in pieces": {"chunk_size": 4, "max_tokens_override": 6, "max_requests_override": 4},
    "two at a time": {"max_requests_override": 2},
    "taken out and put back": {"chunk_size": 4, "chunks": 14},
    "no shared beginnings": {"chunk_size": 4, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_greedy_text_is_that_of_the_whole_model(kind: str, context: dict) -> None:
    assert run_ranks(1, continuations, (), SETTINGS[kind], GREEDY, PROMPTS, context)[0] == expected(kind)


def test_texts_in_one_pass_may_have_more_tokens_together_than_there_are_positions() -> None:
    prompts = PROMPTS * 3
    assert sum(map(len, prompts)) > MAX_LENGTH
    found = run_ranks(1, continuations, (), {}, GREEDY, prompts, {"chunks": 64})[0]
    assert found == expected("learned positions") * 3


@pytest.mark.parametrize("layout, context", [((), "prompts in pieces"), ((2, 2, True), "many chunks")], ids=str)
def test_latents_are_kept_instead_of_keys_and_values(layout: tuple, context: str) -> None:
    wanted = run_ranks(1, by_hand, LATENT, PROMPTS, 20)[0]
    ranks = 4 if layout else 1
    for found in run_ranks(ranks, continuations, layout, LATENT, GREEDY, PROMPTS, CONTEXTS[context]):
        assert found == wanted


@pytest.mark.parametrize("layout", [(2, 1), (2, 1, True), (1, 2), (2, 2, True)], ids=str)
@pytest.mark.parametrize("kind", ["learned positions", "llama"])
def test_text_does_not_depend_on_the_layout(layout: tuple, kind: str) -> None:
    for found in run_ranks(layout[0] * layout[1], continuations, layout, SETTINGS[kind], GREEDY, PROMPTS, {}):
        assert found == expected(kind)


SAMPLED = SamplingParams(temperature=1.3, top_p=0.95, repetition_penalty=1.1, num_tokens_to_generate=12, seed=7)


def test_sampled_text_depends_on_neither_neighbours_nor_layout() -> None:
    together = run_ranks(1, continuations, (), LLAMA, SAMPLED, PROMPTS, {})[0]
    assert len({tuple(text) for text in together}) == len(PROMPTS)
    for prompt, text in zip(PROMPTS, together):
        assert run_ranks(1, continuations, (), LLAMA, SAMPLED, [prompt], {"chunk_size": 4})[0] == [text]
    assert run_ranks(4, continuations, (2, 2), LLAMA, SAMPLED, PROMPTS, {})[0] == together


def late_arrivals(settings: dict) -> list:
    """Requests that come and go between passes."""
    engine = build_engine(build_model(**settings), chunk_size=4)
    arrivals = {0: 0, 3: 1, 4: 2, 9: 3}
    finished = {}
    for step in range(60):
        if step in arrivals:
            engine.add_request(arrivals[step], PROMPTS[arrivals[step]], sampling_params=GREEDY)
        for request in engine.step()[0]:
            finished[request.request_id] = request.generated_tokens
    assert all_free(engine)
    return [finished[number] for number in range(4)]


def test_requests_may_arrive_at_any_time() -> None:
    assert run_ranks(1, late_arrivals, LLAMA)[0] == expected("llama")


def shared_beginning() -> tuple[int, int, list, list]:
    model = build_model(**LLAMA)
    engine = build_engine(model, chunk_size=4)
    prompt = PROMPTS[0]
    first = engine.generate([prompt], GREEDY)[0]
    engine.add_request(7, prompt, sampling_params=GREEDY)
    engine._admit(GREEDY)
    cached = engine.context.sequences[7].num_cached
    while engine.has_unfinished_requests():
        (finished, _) = engine.step()
    return cached, len(prompt), first.generated_tokens, finished[0].generated_tokens


def test_an_equal_beginning_is_not_computed_again() -> None:
    cached, length, first, second = run_ranks(1, shared_beginning)[0]
    assert cached == (length - 1) // 4 * 4
    assert first == second


def log_probs(layout: tuple, context: dict) -> list[tuple]:
    params = SamplingParams(
        top_k=1, num_tokens_to_generate=6, return_log_probs=True, top_n_logprobs=3, return_prompt_top_n_logprobs=True
    )
    plain = SamplingParams(top_k=1, num_tokens_to_generate=6)
    engine = build_engine(build_model(*layout, **LLAMA), **context)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(number, prompt, sampling_params=plain if number == 1 else params)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {request.request_id: request for request in engine.step()[0]}
    assert finished[1].generated_log_probs is None and finished[1].prompt_log_probs is None
    return [
        (
            finished[number].tokens,
            finished[number].prompt_log_probs + finished[number].generated_log_probs,
            finished[number].prompt_top_n_token_logprobs + finished[number].generated_top_n_token_logprobs,
            finished[number].prompt_top_n_logprobs,
        )
        for number in (0, 2, 3)
    ]


def expected_log_probs(tokens: list[int]) -> tuple[torch.Tensor, Any]:
    table = whole_logits(build_model(**LLAMA), tokens).log_softmax(-1)[:-1]
    return table.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], table.topk(3)


@pytest.mark.parametrize(
    "layout, context",
    [((), {}), ((), {"max_tokens_override": 6, "max_requests_override": 4}), ((2, 2, True), {"chunk_size": 4})],
    ids=["whole prompts", "prompts in pieces", "four ranks"],
)
def test_log_probabilities_are_those_of_a_full_pass(layout: tuple, context: dict) -> None:
    ranks = layout[0] * layout[1] if layout else 1
    for tokens, values, best, named in run_ranks(ranks, log_probs, layout, context)[0]:
        expected, top = run_ranks(1, expected_log_probs, tokens)[0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)
        assert [[token for token, _ in row] for row in best] == top.indices.tolist()
        numbers = torch.tensor([[value for _, value in row] for row in best])
        torch.testing.assert_close(numbers, top.values, atol=1e-4, rtol=0)
        assert list(named[0]) == [str(token) for token in top.indices[0].tolist()]


def endings() -> list:
    model = build_model(**LLAMA)
    text = greedy_by_hand(model, PROMPTS[2], 8)
    engine = build_engine(model)
    engine.termination_id = text[4]
    first = text.index(text[4]) + 1
    cases = [
        (SamplingParams(top_k=1, num_tokens_to_generate=8), first, FinishReason.STOP),
        (SamplingParams(top_k=1, num_tokens_to_generate=8, ignore_termination=True), 8, FinishReason.LENGTH),
        (SamplingParams(top_k=1, num_tokens_to_generate=8, stop_token_ids=(text[0],)), 1, FinishReason.STOP),
        (SamplingParams(top_k=1, num_tokens_to_generate=0, return_log_probs=True), 0, FinishReason.LENGTH),
    ]
    for params, length, reason in cases:
        (request,) = engine.generate([PROMPTS[2]], params)
        assert request.generated_tokens == text[:length] and request.finish_reason is reason
        assert request.generated_text == " ".join(map(str, text[:length]))
    engine.add_request(5, PROMPTS[0], sampling_params=GREEDY)
    engine.add_request(6, PROMPTS[2], sampling_params=SamplingParams(top_k=1, num_tokens_to_generate=3))
    engine.step()
    engine.cancel(5)
    assert engine.cancel(99) is None
    assert engine.step()[0] == []
    (finished, _) = engine.step()
    assert [request.generated_tokens for request in finished] == [text[:3]]
    assert all_free(engine)
    return text


def test_a_text_ends_where_it_should() -> None:
    run_ranks(1, endings)


def refusals() -> None:
    model = build_model()
    engine = build_engine(model)
    with pytest.raises(MaxSequenceLengthOverflowError, match="40 tokens and 20 more"):
        engine.generate([[1], [2] * 40], GREEDY)
    assert not engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="empty"):
        engine.add_request(0, [])
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB_SIZE}"):
        engine.add_request(0, [VOCAB_SIZE])
    engine.add_request(0, [1])
    with pytest.raises(ValueError, match="request 0"):
        engine.add_request(0, [1])
    with pytest.raises(ValueError, match="needs 7"):
        build_engine(model, chunks=6)


def test_what_cannot_be_generated_is_refused() -> None:
    run_ranks(1, refusals)


def bytes_held(layout: tuple, settings: dict) -> None:
    engine = build_engine(build_model(*layout, **settings), chunk_size=4)
    engine.generate(PROMPTS, GREEDY)
    context = engine.context
    pools = {id(pool): pool.nbytes for pair in context._pools.values() for pool in pair}
    tokens = context.chunk_allocator.chunk_count_total * context.chunk_size_tokens
    tp, pp = (*layout, 1, 1)[:2]
    heads = settings.get("num_query_groups", 4) // tp
    of_token = 12 + 4 if "kv_lora_rank" in settings else 2 * heads * 8
    assert sum(pools.values()) == tokens * context.bytes_per_token == tokens * 4 // pp * of_token * 4


@pytest.mark.parametrize("layout", [(), (2, 2)], ids=str)
@pytest.mark.parametrize("settings", [LLAMA, LATENT], ids=["llama", "latents"])
def test_a_cached_token_takes_what_was_computed(settings: dict, layout: tuple) -> None:
    run_ranks(4 if layout else 1, bytes_held, layout, settings)
