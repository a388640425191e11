"""Pretrain a BERT: `torchrun --nproc-per-node N pretrain_bert.py FLAGS` (`--help` lists them)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.enums import ModelType
from megatron.core.models.bert import BertModel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import every_stage_reads, get_timed_batch, masking_settings

BATCH_KEYS = ("text", "types", "labels", "is_random", "loss_mask", "padding_mask")
model_type = ModelType.encoder_or_decoder
args_defaults = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "bert"}


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> BertModel:
    """This pipeline stage (or virtual stage) of the model that the flags describe."""
    args = get_args()
    print_rank_0("building BERT model ...")
    layer_spec = bert_layer_local_spec
    if args.spec is not None and args.spec[0] != "local":
        layer_spec = import_module(args.spec)
    return BertModel(
        config=core_transformer_config_from_args(args),
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=layer_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        add_binary_head=args.bert_binary_head,
        vp_stage=vp_stage,
        rotary_base=args.rotary_base,
        true_vocab_size=get_tokenizer().vocab_size,
        return_embeddings=args.output_bert_embeddings and post_process,
    )


def loss_func(batch: dict[str, Tensor], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, what to report): the mean over hidden tokens, plus that of the order of the two parts."""
    token_losses, order_logits = output
    weights = batch["loss_mask"].float()
    lm_loss = torch.sum(token_losses.float() * weights) / weights.sum().clamp(min=1)
    losses = {"lm loss": lm_loss}
    if order_logits is not None:
        losses["sop loss"] = cross_entropy(order_logits.float(), batch["is_random"], ignore_index=-1)
    one = torch.ones_like(lm_loss)  # reported as (sum, count): the mean over microbatches
    return sum(losses.values()), {name: torch.stack([loss.detach(), one]) for name, loss in losses.items()}


def forward_step(data_iterator: Iterator[Any] | None, model: Any) -> tuple[Any, Any]:
    """Forward of one microbatch: losses and scores (the activations, before the last stage)."""
    batch = get_timed_batch(data_iterator, BATCH_KEYS)
    output = model(
        batch["text"],
        batch["padding_mask"],
        tokentype_ids=batch["types"] if get_args().bert_binary_head else None,
        lm_labels=batch["labels"],
    )
    return output, partial(loss_func, batch)


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Training, validation and test data of the given sizes."""
    args = get_args()
    config = BERTMaskedWordPieceDatasetConfig(
        **masking_settings(args),
        sequence_length=args.seq_length,
        masking_max_ngram=3,
        masking_use_geometric_distribution=False,
        classification_head=args.bert_binary_head,
    )
    builder = BlendedMegatronDatasetBuilder(BERTMaskedWordPieceDataset, num_samples, every_stage_reads, config)
    return tuple(builder.build())


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    pretrain(train_valid_test_datasets_provider, model_provider, model_type, forward_step, args_defaults=args_defaults)
