"""Small models and engines for tests of generation."""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.inference.contexts import DynamicInferenceContext, cache_sizes_of
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

VOCAB_SIZE, PADDED_VOCAB_SIZE, MAX_LENGTH = 50, 64, 48

LLAMA = {
    "position_embedding_type": "rope",
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
LATENT = {
    "multi_latent_attention": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "qk_layernorm": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rotary_scaling_factor": 4.0,
    "max_position_embeddings": 16,
}


def build_model(tp: int = 1, pp: int = 1, sp: bool = False, **settings: Any) -> GPTModel:
    """A GPT of four layers; `settings` are the configuration's, and the position embedding type."""
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(123)
    positions = settings.pop("position_embedding_type", "learned_absolute")
    config_class = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    config = config_class(
        num_layers=4,
        hidden_size=settings.pop("hidden_size", 32),
        num_attention_heads=4,
        init_method_std=0.3,  # sharp enough that no two tokens are nearly equally likely
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        pipeline_dtype=torch.float32,
        **settings,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        ),
        PADDED_VOCAB_SIZE,
        MAX_LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type=positions,
        true_vocab_size=VOCAB_SIZE,
    ).eval()


class Words:
    """A tokenizer whose texts are numbers between spaces."""

    eod, bos = 0, 1

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int]) -> str:
        return " ".join(str(token) for token in tokens)


def build_engine(model: GPTModel, *, chunk_size: int = 8, chunks: int = 65, **settings: Any) -> DynamicInferenceEngine:
    """An engine over a pool of `chunks`; `settings` are the context's."""
    config = model.config
    sizes = cache_sizes_of([model], torch.float32, parallel_state.get_pipeline_model_parallel_group())
    common = {
        "params_dtype": torch.float32,
        "num_layers": config.num_layers,
        "kv_channels": config.kv_channels,
        "num_attention_heads": config.num_attention_heads,
        "max_sequence_length": MAX_LENGTH,
        "chunk_size_tokens": chunk_size,
        "token_multiple": config.tensor_model_parallel_size if config.sequence_parallel else 1,
        "buffer_guaranteed_fraction": 0.0,
        "max_requests_override": 8 if sizes.per_text else None,
        "cache_sizes": sizes,
    }
    texts = settings.get("max_requests_override") or common["max_requests_override"] or 0
    size = ((chunks + 0.5) * chunk_size * sizes.per_token + texts * sizes.per_text) / 2**30
    context = DynamicInferenceContext(**(common | {"buffer_size_gb": size} | settings))
    wrapper = GPTInferenceWrapper(
        model, InferenceWrapperConfig(config.hidden_size, torch.float32, -1, PADDED_VOCAB_SIZE), context
    )
    return DynamicInferenceEngine(TextGenerationController(wrapper, Words()), context, termination_id=-1)


def greedy_by_hand(model: GPTModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What the whole model makes of the whole text, again and again: the definition."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = whole_logits(model, text)
            text.append(int(logits[-1].argmax()))
    return text[len(prompt) :]


def whole_logits(model: GPTModel, text: list[int]) -> torch.Tensor:
    """[len(text), VOCAB_SIZE] of one pass without any memory."""
    with torch.no_grad():
        return model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, :, :VOCAB_SIZE]
