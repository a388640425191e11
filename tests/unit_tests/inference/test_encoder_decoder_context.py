"""Texts of a T5 that keeps keys and values are those of whole passes; its memory is as computed, and given back."""

from __future__ import annotations

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.inference.contexts import (
    EncoderDecoderContext,
    MaxSequenceLengthOverflowError,
    RequestOverflowError,
    cache_sizes_of,
)
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import FinishReason
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.model_inference_wrappers.t5.t5_inference_wrapper import T5InferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.inference.small_models import Words
from tests.worker_pool import run_ranks

VOCAB_SIZE, LONGEST, START, NEW = 50, 24, 1, 9
LAYERS, HEADS, WIDTH = 2, 4, 8
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [31, 41, 5], [2, 7, 1, 8, 2, 8]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=NEW, return_log_probs=True)


def build_model(positions: str) -> T5Model:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, init_method_std=0.3
    )
    specs = encoder_model_with_local_spec(), decoder_model_with_local_spec()
    model = T5Model(config, config, *specs, 64, LONGEST, position_embedding_type=positions, true_vocab_size=VOCAB_SIZE)
    with torch.no_grad():  # a text that hangs on what was written, and on the prompt
        for name, param in model.named_parameters():
            param.mul_(3.0 if "relative" in name or "cross_attention" in name else 1.0)
    return model.eval()


def build_engine(model: T5Model, **settings: float) -> DynamicInferenceEngine:
    per_token = cache_sizes_of([model], torch.float32).per_encoded_token
    context = EncoderDecoderContext(START, LONGEST, 3, bytes_per_token=per_token, **settings)
    wrapper = T5InferenceWrapper(model, InferenceWrapperConfig(HEADS * WIDTH, torch.float32, -1, 64), context)
    return DynamicInferenceEngine(TextGenerationController(wrapper, Words()), context, termination_id=-1)


def by_hand(model: T5Model, prompt: list[int]) -> list[int]:
    """The whole model over the whole text, again and again."""
    return told_by_hand(model, prompt)[0]


@torch.no_grad()
def told_by_hand(model: T5Model, prompt: list[int]) -> tuple[list[int], list[float]]:
    """(tokens, their log-probabilities)."""
    text, values = [START], []
    for _ in range(NEW):
        logits = model(torch.tensor([prompt]), torch.tensor([text]), None, None, None)
        value, token = logits[0, -1, :VOCAB_SIZE].log_softmax(-1).max(-1)
        text.append(int(token))
        values.append(float(value))
    return text[1:], values


def texts(positions: str) -> None:
    """Prompts come while others are written; the longest one's memory is larger than that of those before."""
    model = build_model(positions)
    engine = build_engine(model)
    order = [1, 2, 0, 3]
    for number in order:
        engine.add_request(number, PROMPTS[number], sampling_params=GREEDY)
        engine.step()
        engine.step()
    finished = []
    while engine.has_unfinished_requests():
        finished += engine.step()[0]
    assert len({tuple(request.generated_tokens) for request in finished}) == len(PROMPTS)
    assert any(len(set(request.generated_tokens)) > 2 for request in finished)
    for request in finished:
        tokens, values = told_by_hand(model, PROMPTS[request.request_id])
        assert request.generated_tokens == tokens
        assert request.generated_log_probs == pytest.approx(values, abs=1e-4)
    assert engine.context.written.num_bytes == engine.context.encoded.num_bytes == 0


@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "relative"])
def test_texts_are_those_of_whole_passes(positions: str) -> None:
    run_ranks(1, texts, positions)


def memory() -> None:
    model = build_model("relative")
    per_token = cache_sizes_of([model], torch.float32).per_encoded_token
    assert per_token == LAYERS * 2 * HEADS * WIDTH * 4 == cache_sizes_of([model], torch.float32).per_token
    engine = build_engine(model, buffer_size_gb=2 * (len(PROMPTS[0]) + NEW) * per_token / 2**30)
    context = engine.context
    for number in range(3):
        engine.add_request(number, PROMPTS[number], sampling_params=GREEDY)
    finished = engine.step()[0]
    assert len(context.sequences) == 2 and list(engine.waiting) == [2]  # three rows that wide would be too much
    assert context.written.num_bytes == 2 * NEW * per_token
    assert context.encoded.num_bytes == 2 * len(PROMPTS[0]) * per_token
    engine.cancel(0)  # the last row takes the place of the first; there is room for short ones now
    while engine.has_unfinished_requests():
        finished += engine.step()[0]
        longest = max((len(PROMPTS[number]) for number in context.sequences), default=0)
        held = context.encoded.num_bytes + context.written.num_bytes
        assert held <= 2 * (len(PROMPTS[0]) + NEW) * per_token and (longest or not held)
    assert [request.generated_tokens for request in finished] == [by_hand(model, PROMPTS[n]) for n in (1, 2)]
    assert all(request.finish_reason is FinishReason.LENGTH for request in finished)
    assert context.written.num_bytes == context.encoded.num_bytes == 0
    with pytest.raises(MaxSequenceLengthOverflowError, match="40 more"):
        engine.add_request(9, PROMPTS[0], 40)
    with pytest.raises(MaxSequenceLengthOverflowError, match="1 to 24"):
        context.add_request(9, [3] * 25, 1)
    for number in range(3):
        context.add_request(number, [3], 1)
    with pytest.raises(RequestOverflowError, match="3 texts"):
        context.add_request(3, [3], 1)


def test_memory_is_as_computed_bounded_and_given_back() -> None:
    run_ranks(1, memory)


def test_bias_of_single_positions_is_that_of_the_whole_text() -> None:
    table = RelativePositionEmbedding(False, torch.nn.init.normal_, 4, 8, 20)
    torch.nn.init.normal_(table.relative_attention_bias.weight)
    whole = table(30, 30)[0]  # [a, q, k]
    positions = torch.tensor([0, 7, 29])
    torch.testing.assert_close(table.at(positions, 30)[:, :, 0], whole[:, positions].transpose(0, 1))
