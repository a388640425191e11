"""Generation: equal to a plain loop on one process, under every layout, for ragged batches and long texts."""

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.inference.text_generation import generate
from tests.worker_pool import run_ranks

VOCAB_SIZE, PADDED_VOCAB_SIZE, MAX_CONTEXT = 50, 64, 16
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5]]


def build_model(tp_size: int = 1, pp_size: int = 1, sequence_parallel: bool = False, cp_size: int = 1) -> GPTModel:
    parallel_state.initialize_model_parallel(tp_size, pp_size, context_parallel_size=cp_size)
    model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        init_method_std=0.3,  # sharp enough that no two tokens are nearly equally likely
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        sequence_parallel=sequence_parallel,
        context_parallel_size=cp_size,
        pipeline_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        PADDED_VOCAB_SIZE,
        MAX_CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        true_vocab_size=VOCAB_SIZE,
    )


def continue_prompts(layout: tuple, prompts: list, params: SamplingParams, eod: int | None = None) -> list:
    model = build_model(*layout)
    return generate([model], prompts, params, vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT, end_of_document=eod)


def continue_by_hand(prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy text of one prompt by one process: the definition."""
    model = build_model().eval()
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            window = torch.tensor([text[-MAX_CONTEXT:]])
            logits = model(window, torch.arange(window.size(1))[None], None)
            text.append(int(logits[0, -1, :VOCAB_SIZE].argmax()))
    return text[len(prompt) :]


def test_greedy_text_is_that_of_a_plain_loop() -> None:
    """Alone or in a ragged batch, and past the end of the context window."""
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=20)
    (together,) = run_ranks(1, continue_prompts, (), PROMPTS, greedy)
    for prompt, continuation in zip(PROMPTS, together):
        assert run_ranks(1, continue_by_hand, prompt, 20) == [continuation]


@pytest.mark.parametrize("layout", [(2, 1), (2, 1, True), (1, 2), (2, 2, True), (1, 1, False, 2), (2, 1, True, 2)])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1, num_tokens_to_generate=6),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.95, num_tokens_to_generate=6, seed=5),
    ],
    ids=["greedy", "sampled"],
)
def test_text_does_not_depend_on_the_layout(layout: tuple, params: SamplingParams) -> None:
    expected = run_ranks(1, continue_prompts, (), PROMPTS, params)
    world_size = layout[0] * layout[1] * (layout[3] if len(layout) > 3 else 1)
    assert run_ranks(world_size, continue_prompts, layout, PROMPTS, params) == expected * world_size


def test_a_text_stops_before_end_of_document_and_others_go_on() -> None:
    greedy = SamplingParams(top_k=1, num_tokens_to_generate=8)
    (free,) = run_ranks(1, continue_prompts, (), PROMPTS, greedy)
    eod = free[0][3]
    (stopped,) = run_ranks(1, continue_prompts, (), PROMPTS, greedy, eod)
    assert stopped == [text[: text.index(eod)] if eod in text else text for text in free]
    assert len(stopped[0]) <= 3


def test_padding_tokens_are_never_chosen() -> None:
    params = SamplingParams(temperature=100.0, num_tokens_to_generate=60)
    (texts,) = run_ranks(1, continue_prompts, (), PROMPTS, params)
    tokens = [token for text in texts for token in text]
    assert max(tokens) < VOCAB_SIZE
    assert len(set(tokens)) > VOCAB_SIZE // 2  # nearly uniform: the draw is not stuck


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompt"), ([[1], []], "prompt 1 is empty"), ([[VOCAB_SIZE]], "outside the vocabulary of 50")],
)
def test_bad_prompts_are_named(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate([], prompts, SamplingParams(), vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT)
