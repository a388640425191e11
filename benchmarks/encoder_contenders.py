"""BERT and T5 for `train_cpu.py`: ours and Hugging Face's, the same kind of model on the same batches.

BERT: `BertForPreTraining`, 512 tokens of which 15 % are hidden, and the order of two parts. Ours computes scores of the
vocabulary for the hidden tokens only, Hugging Face's for all tokens: a third contender is theirs with that changed.
T5: version 1.1 (relative positions, RMSNorm, gated tanh GELU, no biases), 512 tokens for the encoder and 114 for the
decoder. No dropout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training_steps import BATCH, LENGTH, Step, our_config, prepare_one_process, scheduled_step, torch_step

Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
"""(model, batch) -> mean loss."""

DECODER_LENGTH = 114
BERT_VOCAB, T5_VOCAB = 30592, 32128


@dataclass(frozen=True)
class EncoderSize:
    """Shape of a model; of a T5, layers of each stack."""

    layers: int
    hidden: int
    heads: int
    width: int
    """Of the feed-forward blocks."""


SIZES = {
    "bert": {"base": EncoderSize(12, 768, 12, 3072)},
    "t5": {"small": EncoderSize(8, 512, 6, 1024)},  # T5 v1.1 small: heads of 64
}
VOCAB = {"bert": BERT_VOCAB, "t5": T5_VOCAB}
TOKENS = {"bert": LENGTH * BATCH, "t5": (LENGTH + DECODER_LENGTH) * BATCH}
HEAD_WIDTH = 64


def batches(model: str, seed: int = 2) -> Iterator[Batch]:
    """Random tokens of full length."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if model == "bert":
            ids = torch.randint(5, BERT_VOCAB, (BATCH, LENGTH), generator=generator)
            hidden = torch.rand(ids.shape, generator=generator) < 0.15
            yield {
                "ids": torch.where(hidden, 4, ids),
                "labels": torch.where(hidden, ids, -1),
                "types": (torch.arange(LENGTH) >= LENGTH // 2).long().expand_as(ids).contiguous(),
                "order": torch.randint(0, 2, (BATCH,), generator=generator),
                "real": torch.ones_like(ids),
            }
        else:
            yield {
                "ids": torch.randint(0, T5_VOCAB, (BATCH, LENGTH), generator=generator),
                "decoder": torch.randint(0, T5_VOCAB, (BATCH, DECODER_LENGTH), generator=generator),
                "labels": torch.randint(0, T5_VOCAB, (BATCH, DECODER_LENGTH), generator=generator),
                "real": torch.ones(BATCH, LENGTH, dtype=torch.int64),
            }


# --- Hugging Face ---------------------------------------------------------------------------------------


def _their_bert(size: EncoderSize, *, hidden_only: bool = False) -> tuple[nn.Module, Loss]:
    """`hidden_only`: with scores of the vocabulary for the hidden tokens only, as ours."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=BERT_VOCAB,
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def loss(model: Any, batch: Batch) -> Tensor:
        return model(
            batch["ids"],
            attention_mask=batch["real"],
            token_type_ids=batch["types"],
            labels=batch["labels"].masked_fill(batch["labels"] < 0, -100),
            next_sentence_label=batch["order"],
        ).loss

    def loss_of_hidden(model: Any, batch: Batch) -> Tensor:
        output = model.bert(batch["ids"], attention_mask=batch["real"], token_type_ids=batch["types"])
        hidden = batch["labels"] >= 0
        scores = model.cls.predictions(output.last_hidden_state[hidden])
        order = model.cls.seq_relationship(output.pooler_output)
        return F.cross_entropy(scores, batch["labels"][hidden]) + F.cross_entropy(order, batch["order"])

    return BertForPreTraining(config).train(), loss_of_hidden if hidden_only else loss


def their_t5(size: EncoderSize) -> tuple[nn.Module, Loss]:
    """transformers' model of version 1.1, and its loss of a batch."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=T5_VOCAB,
        d_model=size.hidden,
        d_kv=HEAD_WIDTH,
        d_ff=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        use_cache=False,
    )
    model = T5ForConditionalGeneration(config).train()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # version 1.1 has its own

    def loss(model: Any, batch: Batch) -> Tensor:
        return model(
            input_ids=batch["ids"],
            attention_mask=batch["real"],
            decoder_input_ids=batch["decoder"],
            labels=batch["labels"],
        ).loss

    return model, loss


# --- ours -----------------------------------------------------------------------------------------------


def _our_encoder_config(size: EncoderSize, half: bool, **others: Any) -> Any:
    return our_config(size.layers, size.hidden, size.heads, half=half, ffn_hidden_size=size.width, **others)


def _our_bert(size: EncoderSize, half: bool) -> tuple[Any, nn.Module, Loss]:
    from megatron.core.models.bert import BertModel
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    config = _our_encoder_config(size, half)
    bert = BertModel(config, 2, bert_layer_local_spec, BERT_VOCAB, LENGTH, share_embeddings_and_output_weights=True)

    def loss(model: Any, batch: Batch) -> Tensor:
        losses, order = model(batch["ids"], batch["real"], batch["types"], batch["labels"])
        return losses.sum() / (batch["labels"] >= 0).sum() + F.cross_entropy(order.float(), batch["order"])

    return config, bert, loss


def our_t5(size: EncoderSize, half: bool) -> tuple[Any, nn.Module, Loss]:
    """Configuration, model, and its loss of a batch."""
    from megatron.core.models.T5 import T5Model
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec

    shape: dict[str, Any] = {
        "kv_channels": HEAD_WIDTH,
        "activation_func": F.gelu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "softmax_scale": 1.0,
    }
    config = _our_encoder_config(size, half, **shape)
    t5 = T5Model(
        config,
        config,
        encoder_model_with_local_spec(),
        decoder_model_with_local_spec(),
        T5_VOCAB,
        LENGTH,
        position_embedding_type="relative",
    )

    def loss(model: Any, batch: Batch) -> Tensor:
        padding = (batch["real"] == 0)[:, None, None, :]
        return model(batch["ids"], batch["decoder"], padding, None, padding, batch["labels"]).mean()

    return config, t5, loss


# --- steps ----------------------------------------------------------------------------------------------


def theirs(build: Callable[..., tuple[nn.Module, Loss]], size: EncoderSize, how: str) -> Step:
    """A training step of Hugging Face's model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    module, loss_of = build(size)
    return torch_step(module, partial(loss_of, module), how)


def ours(build: Callable[..., tuple[Any, nn.Module, Loss]], size: EncoderSize, how: str) -> Step:
    """One of our model: schedule, data parallel buffers, its optimizer."""
    prepare_one_process()
    config, module, loss_of = build(size, how == "bf16")

    def forward_step(batch: Any, model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return loss_of(model, *next(batch)), lambda loss: (loss, {"loss": loss.detach()})

    return scheduled_step(module, config, forward_step)


CONTENDERS: dict[str, dict[str, Callable[[EncoderSize, str], Step]]] = {
    "bert": {
        "ours": partial(ours, _our_bert),
        "hugging face": partial(theirs, _their_bert),
        "hugging face, hidden tokens": partial(theirs, partial(_their_bert, hidden_only=True)),
    },
    "t5": {"ours": partial(ours, our_t5), "hugging face": partial(theirs, their_t5)},
}
"""By model and name: what makes a step of (size, "fp32" or "bf16")."""
