"""A random Hugging Face T5 v1.1 and ours with its weights: equal scores, with one rank and two."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.export import ModelShape, from_hf, load_whole_state, to_hf
from megatron.core.export.families.t5 import t5_weights
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import gelu_impl
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

HIDDEN, HEADS, CHANNELS, WIDTH, VOCAB = 48, 4, 16, 80, 96
ENCODER, DECODER = 3, 2  # layers
ENCODER_LENGTH, DECODER_LENGTH = 40, 24  # beyond the 16 exact distances
LENGTHS = (40, 29)  # real tokens of the two samples


def hf_model() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=CHANNELS,
        d_ff=WIDTH,
        num_layers=ENCODER,
        num_decoder_layers=DECODER,
        num_heads=HEADS,
        relative_attention_max_distance=30,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(HIDDEN**-0.5 * torch.randn(VOCAB, HIDDEN))  # not the embedding
    with torch.no_grad():  # norms start as ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape))
    return model


def our_config(num_layers: int, tp: int, backend: AttnBackend = AttnBackend.auto) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=CHANNELS,
        ffn_hidden_size=WIDTH,
        activation_func=gelu_impl,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        softmax_scale=1.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=backend,
        tensor_model_parallel_size=tp,
    )


def shape_of(tp: int) -> ModelShape:
    return ModelShape.of_config(our_config(DECODER, tp), encoder_num_layers=ENCODER)


def our_scores(tp: int, backend: AttnBackend, theirs: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config, encoder_config = our_config(DECODER, tp, backend), our_config(ENCODER, tp, backend)
    model = T5Model(
        config,
        encoder_config,
        encoder_model_with_local_spec(),
        decoder_model_with_local_spec(),
        VOCAB + 32,
        ENCODER_LENGTH,
        position_embedding_type="relative",
        relative_attention_max_distance=30,
    ).eval()
    load_whole_state(model, from_hf(t5_weights(shape_of(tp)), theirs))
    ids, real, decoder_ids = batch
    padding = (real == 0)[:, None, None, :]
    with torch.no_grad():
        logits = model(ids, decoder_ids, padding, None, padding)
        return gather_from_tensor_model_parallel_region(logits)[..., :VOCAB]


@pytest.mark.parametrize(("tp", "backend"), [(1, AttnBackend.auto), (1, AttnBackend.unfused), (2, AttnBackend.auto)])
def test_scores(tp: int, backend: AttnBackend) -> None:
    reference = hf_model()
    ids = torch.randint(0, VOCAB, (2, ENCODER_LENGTH))
    real = (torch.arange(ENCODER_LENGTH)[None] < torch.tensor(LENGTHS)[:, None]).long()
    decoder_ids = torch.randint(0, VOCAB, (2, DECODER_LENGTH))
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=real, decoder_input_ids=decoder_ids).logits
    theirs = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for logits in run_ranks(tp, our_scores, tp, backend, theirs, (ids, real, decoder_ids)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_return_unchanged() -> None:
    theirs = hf_model().state_dict()
    back = to_hf(t5_weights(shape_of(1)), from_hf(t5_weights(shape_of(1)), theirs))
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    assert set(theirs) - set(back) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
