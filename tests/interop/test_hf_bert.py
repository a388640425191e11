"""Random Hugging Face BERTs and ours with their weights: equal scores, with one rank and two."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.bert import BertModel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.hf_weights import bert_weights, megatron_bert_weights
from megatron.core.models.gpt.hf_weights import from_hf, load_whole_state, to_hf
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 3, 64, 4, 96, 32
LENGTHS = (32, 20)  # real tokens of the two sequences


def hf_model(kind: str) -> Any:
    torch.manual_seed(0)
    config_class = transformers.BertConfig if kind == "bert" else transformers.MegatronBertConfig
    model_class = transformers.BertForPreTraining if kind == "bert" else transformers.MegatronBertForPreTraining
    config = config_class(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
    )
    model = model_class(config).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    return model


def our_config(kind: str, tp: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=1e-12,
        apply_residual_connection_post_layernorm=kind == "bert",
        tensor_model_parallel_size=tp,
    )


def weights_of(kind: str, config: TransformerConfig) -> Any:
    return bert_weights(config) if kind == "bert" else megatron_bert_weights(config)


def our_scores(kind: str, tp: int, theirs: dict[str, Tensor], batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = our_config(kind, tp)
    model = BertModel(
        config, 2, bert_layer_local_spec, VOCAB + 32, LENGTH, share_embeddings_and_output_weights=True
    ).eval()
    load_whole_state(model, from_hf(weights_of(kind, config), theirs))
    ids, real, types = batch
    with torch.no_grad():
        logits, order = model(ids, real, types)
        return gather_from_tensor_model_parallel_region(logits)[..., :VOCAB], order


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "megatron-bert"])
def test_scores(kind: str, tp: int) -> None:
    reference = hf_model(kind)
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    real = (torch.arange(LENGTH)[None] < torch.tensor(LENGTHS)[:, None]).long()
    types = (torch.arange(LENGTH)[None] >= 9).long().expand_as(ids).contiguous()
    with torch.no_grad():
        expected = reference(ids, attention_mask=real, token_type_ids=types)
    theirs = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for logits, order in run_ranks(tp, our_scores, kind, tp, theirs, (ids, real, types)):
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(
                logits[row, :length], expected.prediction_logits[row, :length], rtol=1e-5, atol=2e-5
            )
        torch.testing.assert_close(order, expected.seq_relationship_logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "megatron-bert"])
def test_weights_return_unchanged(kind: str) -> None:
    theirs = hf_model(kind).state_dict()
    config = our_config(kind, 1)
    back = to_hf(weights_of(kind, config), from_hf(weights_of(kind, config), theirs))
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert {name for name in theirs if not name.endswith("position_ids")} - set(back) <= tied
