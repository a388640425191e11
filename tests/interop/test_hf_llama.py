"""Random Hugging Face Llama and Qwen2 models and ours with their weights: equal logits, with one rank and
two."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.hf_weights import from_hf, llama_weights, load_whole_state, to_hf
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCAB, LENGTH, BASE = 3, 64, 8, 4, 96, 96, 48, 5000.0

SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": BASE,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": BASE,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (family, their settings, our TransformerConfig, our GPTModel)
    "grouped": ("Llama", {}, {}, {}),
    "tied": (
        "Llama",
        {"tie_word_embeddings": True},
        {},
        {"share_embeddings_and_output_weights": True},
    ),
    "llama3": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE},
        {},
        {"rope_scaling": True, "rope_scaling_factor": 4.0},
    ),
    "linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": BASE}},
        {},
        {"seq_len_interpolation_factor": 2.0},
    ),
    "yarn": (
        "Llama",
        {"rope_parameters": YARN_ROPE},
        {
            "yarn_rotary_scaling_factor": 4.0,
            "yarn_original_max_position_embeddings": 32,
            "yarn_beta_fast": 8.0,
        },
        {"position_embedding_type": "yarn"},
    ),
    "qwen2": ("Qwen2", {}, {"add_qkv_bias": True}, {}),
    "mistral_window": ("Mistral", {"sliding_window": 8}, {"window_size": (7, 0)}, {}),
}


def hf_model(family: str, settings: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    default = {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
    config = getattr(transformers, f"{family}Config")(
        **SHAPE, **{**default, **settings}, attn_implementation="eager", bos_token_id=0, eos_token_id=1
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    return model


def our_config(tp: int, settings: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=FFN,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        **settings,
    )


def our_logits(tp: int, case: str, theirs: dict[str, Tensor], ids: Tensor) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    _, _, settings, model_settings = CASES[case]
    config = our_config(tp, settings)
    model_settings = {"position_embedding_type": "rope", "rotary_base": BASE, **model_settings}
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH, **model_settings).eval()
    tied = model_settings.get("share_embeddings_and_output_weights", False)
    load_whole_state(model, from_hf(llama_weights(config, tied), theirs))
    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(model(ids, None, None))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tp: int) -> None:
    family, settings, _, _ = CASES[case]
    reference = hf_model(family, settings)
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        expected = reference(ids).logits
    theirs = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for logits in run_ranks(tp, our_logits, tp, case, theirs, ids):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_return_unchanged() -> None:
    theirs = hf_model("Qwen2", {}).state_dict()
    config = our_config(1, {"add_qkv_bias": True})
    back = to_hf(llama_weights(config), from_hf(llama_weights(config), theirs))
    assert set(back) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())
