"""Pretrain a Mamba or hybrid model: `torchrun --nproc-per-node N pretrain_mamba.py FLAGS` (`--help` lists them).

Batches, data sets and the loss are those of `pretrain_gpt.py`.
"""

from __future__ import annotations

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from pretrain_gpt import forward_step, train_valid_test_datasets_provider

args_defaults: dict[str, Any] = {"tokenizer_type": "GPT2BPETokenizer", "model_family": "mamba"}


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> MambaModel:
    """This pipeline stage of the model that the flags describe."""
    args = get_args()
    print_rank_0("building Mamba model ...")
    return MambaModel(
        config=core_transformer_config_from_args(args),
        mamba_stack_spec=import_module(tuple(args.spec)),  # type: ignore[arg-type]
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        hybrid_attention_ratio=args.hybrid_attention_ratio,
        hybrid_mlp_ratio=args.hybrid_mlp_ratio,
        hybrid_override_pattern=args.hybrid_override_pattern,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        true_vocab_size=get_tokenizer().vocab_size,
    )


if __name__ == "__main__":
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults=args_defaults,
    )
