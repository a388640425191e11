"""Pretrain a GPT: `torchrun --nproc-per-node N pretrain_gpt.py FLAGS` (`--help` lists them)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import (
    batch_keys,
    dataset_settings,
    dense_attention_mask,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from tasks.during_training import add_eval_task_arguments, eval_task_actions


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    """This pipeline stage of the model that the flags describe."""
    args = get_args()
    print_rank_0("building GPT model ...")
    config = core_transformer_config_from_args(args)
    if args.spec is not None and args.spec[0] != "local":
        layer_spec = import_module(args.spec)
    elif args.num_experts:
        layer_spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        layer_spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm,
            multi_latent_attention=args.multi_latent_attention,
            normalization=args.normalization,
        )
    further = get_gpt_mtp_block_spec(config, layer_spec, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(
        config=config,
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
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=further,
        vp_stage=vp_stage,
        true_vocab_size=get_tokenizer().vocab_size,
    )


def get_batch(data_iterator: Iterator[Any] | None) -> dict[str, Any]:
    """One microbatch, [b, s/cp] each, with the borders of its documents if they are to be isolated."""
    args = get_args()
    batch: dict[str, Any] = dict(get_batch_on_this_tp_rank(data_iterator))
    packed = None
    if args.reset_attention_mask and batch["attention_mask"] is None:
        packed = PackedSeqParams.from_documents(batch["tokens"], get_tokenizer().eod)  # borders in whole samples
    return get_batch_on_this_cp_rank(batch) | {"packed_seq_params": packed}


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses that count, how many count, what to report)."""
    weights = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * weights)
    num_tokens = weights.sum().to(torch.int64)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[Any] | None, model: Any) -> tuple[Tensor, Any]:
    """Forward of one microbatch: the losses of its tokens (the activations, before the last stage)."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=batch["packed_seq_params"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def reads_data() -> bool:
    """Whether this rank needs data: the first rank of a tensor parallel group on a stage that looks at batches."""
    args = get_args()
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    needed = batch_keys(first, last, args.reset_attention_mask, bool(args.mtp_num_layers))
    return bool(needed) and parallel_state.get_tensor_model_parallel_rank() == 0


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Training, validation and test data of the given sizes."""
    args = get_args()
    config = GPTDatasetConfig(
        **dataset_settings(args),
        sequence_length=args.seq_length,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=dense_attention_mask(args),
        multiple_validation_sets=args.multiple_validation_sets,
    )
    dataset_type = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    return tuple(BlendedMegatronDatasetBuilder(dataset_type, num_samples, reads_data, config).build())


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        extra_args_provider=add_eval_task_arguments,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        more_actions=eval_task_actions,
    )
