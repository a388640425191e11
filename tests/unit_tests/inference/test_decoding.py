"""Text from states, or from latents: that of whole forward passes, for ragged batches, texts that end early and windows
that move."""

from __future__ import annotations

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.inference.decoding import can_decode_from_states
from megatron.inference.text_generation import generate
from tests.worker_pool import run_ranks

VOCAB_SIZE, MAX_CONTEXT = 50, 24
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], [1, 2, 3, 4, 5, 6, 7, 8]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=10)
PATTERN = "M*-M"


class Forgetful(MambaModel):
    """Every token costs a pass over the whole text."""

    decodes_from_states = False  # type: ignore[assignment]


def build_model(tp_size: int, pp_size: int, sequence_parallel: bool, model_type: type) -> MambaModel:
    parallel_state.initialize_model_parallel(tp_size, pp_size)
    model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=len(PATTERN),
        hidden_size=32,
        num_attention_heads=4,
        mamba_head_dim=8,
        mamba_num_groups=2,
        mamba_state_dim=8,
        init_method_std=0.3,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        sequence_parallel=sequence_parallel,
        pipeline_dtype=torch.float32,
    )
    return model_type(
        config,
        mamba_stack_spec,
        64,
        MAX_CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        hybrid_override_pattern=PATTERN,
        position_embedding_type="rope",
        true_vocab_size=VOCAB_SIZE,
    )


def latent_model(tp_size: int, pp_size: int, from_states: bool) -> GPTModel:
    """A GPT that keeps a latent of each token, or nothing."""
    parallel_state.initialize_model_parallel(tp_size, pp_size)
    model_parallel_cuda_manual_seed(123)
    config = MLATransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        multi_latent_attention=True,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        rope_type="rope",
        add_bias_linear=False,
        normalization="RMSNorm",
        init_method_std=0.3,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(multi_latent_attention=True),
        64,
        MAX_CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        true_vocab_size=VOCAB_SIZE,
    )
    if not from_states:
        model.__class__ = type("ForgetfulGPT", (GPTModel,), {"decodes_from_states": False})
    return model


def text_of_latents(tp_size: int, pp_size: int, from_states: bool) -> list[list[int]]:
    model = latent_model(tp_size, pp_size, from_states)
    assert can_decode_from_states([model]) == from_states
    return generate([model], PROMPTS, GREEDY, vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT, end_of_document=None)


def text(
    layout: tuple[int, int, bool], params: SamplingParams, eod: int | None = None, from_states: bool = True
) -> list[list[int]]:
    model = build_model(*layout, MambaModel if from_states else Forgetful)
    assert can_decode_from_states([model]) == (from_states and not layout[2])
    return generate([model], PROMPTS, params, vocab_size=VOCAB_SIZE, max_context=MAX_CONTEXT, end_of_document=eod)


@pytest.mark.parametrize("layout", [(2, 1, False), (1, 2, False), pytest.param((2, 1, True), marks=pytest.mark.slow)])
def test_text_is_that_of_whole_forward_passes(layout: tuple[int, int, bool]) -> None:
    (expected,) = run_ranks(1, text, (1, 1, False), GREEDY, None, False)
    ranks = layout[0] * layout[1]
    assert run_ranks(ranks, text, layout, GREEDY) == [expected] * ranks


@pytest.mark.parametrize("layout", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_text_from_latents_is_that_of_whole_forward_passes(layout: tuple[int, int]) -> None:
    (expected,) = run_ranks(1, text_of_latents, 1, 1, False)
    assert run_ranks(2, text_of_latents, *layout, True) == [expected] * 2


def test_texts_that_end_early_and_windows_that_move() -> None:
    long = SamplingParams(top_k=1, num_tokens_to_generate=20)  # the window is 24
    (free,) = run_ranks(1, text, (1, 1, False), long, None, False)
    eod = free[0][2]
    alone = (1, 1, False)
    results = [run_ranks(1, text, alone, long, end, states)[0] for end in (None, eod) for states in (False, True)]
    assert results[0] == results[1] == free
    assert results[2] == results[3] != free
