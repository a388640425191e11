"""What a caller with its own loop over positions takes from a controller."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import torch

from megatron.core.inference.async_stream import AsyncStream
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from tests.unit_tests.inference.small_models import Words


def controller() -> Any:
    return TextGenerationController(SimpleNamespace(vocab_size=50), Words())  # type: ignore[arg-type]


def test_a_row_ends_at_the_end_of_document_behind_its_prompt() -> None:
    tokens = torch.tensor([[5, 0, 7, 0, 9], [5, 6, 0, 8, 9]])
    prompt_lengths = torch.tensor([2, 3])
    done, lengths = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    states = []
    for position in range(2, 5):
        before = done.clone(), lengths.clone()
        new = controller().update_generation_status(tokens, prompt_lengths <= position, position, done, lengths)
        assert torch.equal(done, before[0]) and torch.equal(lengths, before[1])
        done, lengths = new
        states.append((done.tolist(), lengths.tolist()))
    assert states == [([False, False], [1, 0]), ([True, False], [1, 1]), ([True, False], [1, 2])]


async def all_of(stream: AsyncStream) -> list[InferenceRequest]:
    return [now async for now in stream.generator()]


async def streamed() -> None:
    cancelled: list[str] = []
    streams = [AsyncStream(str(number), cancelled.append) for number in range(2)]
    requests = [InferenceRequest(request_id=str(number), prompt="5 6") for number in range(3)]
    params = SamplingParams(return_log_probs=True, return_segments=True)
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 4], [5, 6, 3, 2]])
    log_probs = -tokens[:, 1:].float()
    given = (["0", "1", "2"], requests, [*streams, None])
    for length, started, done in ((1, [True, False, True], [False] * 3), (2, [True] * 3, [True, False, True])):
        controller().stream_tokens(params, *given, started, done, tokens, [2] * 3, [length] * 3, log_probs)
    controller().stream_tokens(params, *given, [True] * 3, [True] * 3, tokens, [2] * 3, [1] * 3, log_probs)
    told = [await all_of(stream) for stream in streams]
    assert [[now.generated_text for now in row] for row in told] == [["7", "7 8"], ["9 4", "9"]]
    assert [now.status for now in told[0]] == [Status.ACTIVE_AND_GENERATING_TOKENS, Status.COMPLETED]
    last = told[0][-1]
    assert last.segments == ["5", "6", "7", "8"] and last.generated_segments == ["7", "8"]
    assert last.prompt_log_probs.tolist() == [-6] and last.generated_log_probs.tolist() == [-7, -8]
    assert requests[0].generated_text is None and requests[0].status is None and cancelled == []


def test_streams_get_requests_as_they_grow() -> None:
    asyncio.run(streamed())
