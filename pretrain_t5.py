"""Pretrain a T5: `torchrun --nproc-per-node N pretrain_t5.py FLAGS` (`--help` lists them)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.library_configs import two_stack_configs_from_args
from megatron.training.utils import every_stage_reads, get_timed_batch, masking_settings

BATCH_KEYS = ("text_enc", "text_dec", "labels", "loss_mask", "enc_mask", "dec_mask")
model_type = ModelType.encoder_and_decoder
args_defaults = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "t5"}


def model_provider(
    pre_process: bool = True, post_process: bool = True, add_encoder: bool = True, add_decoder: bool = True
) -> T5Model:
    """This pipeline stage of the model that the flags describe."""
    args = get_args()
    print_rank_0("building T5 model ...")
    config, encoder_config = two_stack_configs_from_args(args)
    return T5Model(
        config=config,
        encoder_config=encoder_config,
        transformer_encoder_layer_spec=encoder_model_with_local_spec(),
        transformer_decoder_layer_spec=decoder_model_with_local_spec(),
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
        relative_attention_num_buckets=args.relative_attention_num_buckets,
        relative_attention_max_distance=args.relative_attention_max_distance,
        add_encoder=add_encoder,
        add_decoder=add_decoder,
        rotary_base=args.rotary_base,
        true_vocab_size=get_tokenizer().vocab_size,
    )


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, what to report): the mean over the decoder's real tokens."""
    weights = loss_mask.float()
    loss = torch.sum(losses.float() * weights) / weights.sum().clamp(min=1)
    # Reported as (sum, count): the mean over microbatches.
    return loss, {"lm loss": torch.stack([loss.detach(), torch.ones_like(loss)])}


def forward_step(data_iterator: Iterator[Any] | None, model: Any) -> tuple[Tensor, Any]:
    """Forward of one microbatch: losses of the decoder's tokens (what the next stage takes, before the last)."""
    batch = get_timed_batch(data_iterator, BATCH_KEYS)
    masks = T5MaskedWordPieceDataset.config_attention_mask(
        batch["text_enc"], batch["text_dec"], batch["enc_mask"], batch["dec_mask"]
    )
    labels = batch["labels"].clamp(min=0)  # padding, which counts for nothing
    return model(batch["text_enc"], batch["text_dec"], *masks, lm_labels=labels), partial(loss_func, batch["loss_mask"])


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Training, validation and test data of the given sizes."""
    args = get_args()
    config = T5MaskedWordPieceDatasetConfig(
        **masking_settings(args),
        sequence_length=args.encoder_seq_length,
        sequence_length_decoder=args.decoder_seq_length,
        masking_max_ngram=10,
        masking_use_geometric_distribution=True,
    )
    builder = BlendedMegatronDatasetBuilder(T5MaskedWordPieceDataset, num_samples, every_stage_reads, config)
    return tuple(builder.build())


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    pretrain(train_valid_test_datasets_provider, model_provider, model_type, forward_step, args_defaults=args_defaults)
