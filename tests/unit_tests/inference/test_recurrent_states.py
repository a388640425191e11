"""Mamba layers in the dynamic engine: every text goes on from states of its own, however the engine packs it."""

from __future__ import annotations

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.inference.contexts import cache_sizes_of
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm import ssd
from tests.unit_tests.inference.small_models import build_engine, greedy_by_hand
from tests.unit_tests.inference.test_decoding import build_model
from tests.unit_tests.inference.test_dynamic_engine import all_free
from tests.worker_pool import run_ranks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [27], [31, 41, 5], [3, 1, 4, 1, 5, 9, 2, 6, 11]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=10)
CONTEXTS = {
    "one chunk each": {"chunk_size": 64, "chunks": 8},
    "prompts in pieces": {"chunk_size": 4, "max_tokens_override": 6, "max_requests_override": 4},
    "two at a time": {"max_requests_override": 2},
    "taken out and put back": {"chunk_size": 4, "chunks": 13},
}
SHORT = {"max_sequence_length": 24}  # of build_model


def continuations(layout: tuple, context: dict) -> list:
    engine = build_engine(build_model(*layout, MambaModel), **SHORT, **context)
    twice = [[request.generated_tokens for request in engine.generate(PROMPTS, GREEDY)] for _ in range(2)]
    assert twice[0] == twice[1] and all_free(engine)
    alone = engine.generate([PROMPTS[2]], GREEDY)[0]
    assert alone.generated_tokens == twice[0][2]
    return twice[0]


def by_hand() -> list:
    model = build_model(1, 1, False, MambaModel).eval()
    return [greedy_by_hand(model, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_greedy_text_is_that_of_the_whole_model(context: dict) -> None:
    assert run_ranks(1, continuations, (1, 1, False), context) == run_ranks(1, by_hand)


@pytest.mark.parametrize("layout", [(2, 1, False), (2, 1, True), (1, 2, False)], ids=str)
def test_text_does_not_depend_on_the_layout(layout: tuple) -> None:
    assert run_ranks(2, continuations, layout, CONTEXTS["prompts in pieces"]) == run_ranks(1, by_hand) * 2


def test_a_scan_goes_on_from_a_state() -> None:
    random = torch.Generator().manual_seed(3)
    x, dt = torch.randn(9, 2, 4, 3, generator=random), torch.rand(9, 2, 4, generator=random)
    B, C = (torch.randn(9, 2, 2, 5, generator=random) for _ in range(2))
    A = -torch.rand(4, generator=random)
    y, final = ssd.chunked_scan(x, dt, A, B, C, 4)
    _, state = ssd.chunked_scan(x[:5], dt[:5], A, B[:5], C[:5], 4)
    rest = ssd.chunked_scan(x[5:], dt[5:], A, B[5:], C[5:], 4)
    found = ssd.continue_from(state, *rest, dt[5:], A, C[5:])
    torch.testing.assert_close(found, (y[5:], final))


def memory() -> None:
    model = build_model(1, 1, False, MambaModel)
    sizes = cache_sizes_of([model], torch.bfloat16)
    group = parallel_state.get_pipeline_model_parallel_group()
    assert sizes == cache_sizes_of([model], torch.bfloat16, group)
    inner, states = 64, 2 * 8  # channels; of B or C
    assert sizes.per_token == 2 * 32 * 2  # one attention layer
    assert sizes.per_text == 2 * (4 * (inner + 2 * states) * 2 + inner * 8 * 4)  # two mixers
    engine = build_engine(model, **SHORT)
    engine.generate(PROMPTS, GREEDY)
    context, allocator = engine.context, engine.context.chunk_allocator
    held = sum(pool.nbytes for pools in context._pools.values() for pool in pools)
    held += sum(state.nbytes for states in context._states.values() for state in states)
    counted = allocator.chunk_count_total * 8 * context.cache_sizes.per_token
    assert held == counted + context.max_requests * context.cache_sizes.per_text
    with pytest.raises(ValueError, match="buffer_size_gb"):
        build_engine(model, **SHORT, chunks=2)


def test_memory_is_as_computed() -> None:
    run_ranks(1, memory)
