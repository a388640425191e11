"""A random Hugging Face GPT-2 and ours with its weights: equal logits, with one rank and two."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.export import ModelShape, from_hf, load_whole_state, to_hf
from megatron.core.export.families.gpt2 import weights as gpt2_weights
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 3, 64, 4, 96, 32


def hf_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, vocab_size=VOCAB, n_positions=LENGTH, bos_token_id=0
        )
    ).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    return model


def our_config(tp: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,  # GPT-2's activation is the tanh form
        tensor_model_parallel_size=tp,
    )


def our_logits(tp: int, theirs: dict[str, Tensor], ids: Tensor) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = our_config(tp)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCAB + 32,  # padded
        LENGTH,
        share_embeddings_and_output_weights=True,
    ).eval()
    load_whole_state(model, from_hf(gpt2_weights(ModelShape.of_config(config)), theirs))
    positions = torch.arange(LENGTH).expand_as(ids)
    with torch.no_grad():
        logits = model(ids, positions, None)
        return gather_from_tensor_model_parallel_region(logits)[..., :VOCAB]


@pytest.mark.parametrize("tp", [1, 2])
def test_logits(tp: int) -> None:
    reference = hf_model()
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        expected = reference(ids).logits
    theirs = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for logits in run_ranks(tp, our_logits, tp, theirs, ids):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_return_unchanged() -> None:
    theirs = hf_model().state_dict()
    config = our_config(1)
    back = to_hf(
        gpt2_weights(ModelShape.of_config(config)), from_hf(gpt2_weights(ModelShape.of_config(config)), theirs)
    )
    assert set(back) == set(theirs) - {"lm_head.weight"}  # tied
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())


def test_missing_weights_are_named() -> None:
    theirs = dict(hf_model().state_dict())
    del theirs["transformer.h.1.ln_2.bias"]
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.ln_2\.bias"):
        from_hf(gpt2_weights(ModelShape.of_config(our_config(1))), theirs)
