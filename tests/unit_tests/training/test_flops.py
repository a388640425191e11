"""Operations of a training step: tabled numbers, and the matrix products that a real model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.flops import num_floating_point_operations
from tests.unit_tests.training.settings_for_tests import validated

GPT_345M = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024"
)
LLAMA_3_8B = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    "--ffn-hidden-size 14336 --swiglu --seq-length 8192 --max-position-embeddings 8192"
)
DEEPSEEK_V2_LITE = (
    "--num-layers 27 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 10944 --swiglu --seq-length 4096 "
    "--max-position-embeddings 4096 --disable-bias-linear --num-experts 64 --moe-router-topk 6 "
    "--moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816 --moe-layer-freq ([0]+[1]*26) "
    "--multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128"
)


@pytest.mark.parametrize(
    ("flags", "padded_vocab_size", "batch_size", "expected"),
    [
        (GPT_345M, 50304, 8, 18612240777216),
        (f"{GPT_345M} --mtp-num-layers 1 --position-embedding-type rope", 50304, 8, 21917369106432),
        (LLAMA_3_8B, 128256, 1, 421645529382912),
        (DEEPSEEK_V2_LITE, 102400, 1, 67117793673216),
    ],
)
def test_tabled_models(flags: str, padded_vocab_size: int, batch_size: int, expected: int) -> None:
    args = validated(flags).variant(padded_vocab_size=padded_vocab_size)
    assert num_floating_point_operations(args, batch_size) == expected


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--swiglu --ffn-hidden-size 96 --disable-bias-linear",
        "--group-query-attention --num-query-groups 2 --kv-channels 8 --untie-embeddings-and-output-weights",
    ],
)
def test_matrix_products_of_a_model(flags: str) -> None:
    """Backward costs twice the forward; causality halves attention, which the plain path computes whole."""
    args = validated(f"{flags} --attention-backend unfused").variant(padded_vocab_size=128)
    model = GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    ).eval()
    batch_size = 2
    tokens = torch.zeros(batch_size, args.seq_length, dtype=torch.int64)
    positions = torch.arange(args.seq_length).expand_as(tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, positions, None)
    width = args.num_attention_heads * args.kv_channels
    attention = 4 * args.num_layers * batch_size * args.seq_length**2 * width
    forward = counter.get_total_flops() - attention / 2
    assert num_floating_point_operations(args, batch_size) == 3 * forward


def test_a_tabled_hybrid() -> None:
    flags = (
        "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --group-query-attention --num-query-groups 8 "
        "--ffn-hidden-size 4096 --seq-length 1024 --max-position-embeddings 1024 --hybrid-override-pattern M-M*M-M- "
        "--is-hybrid-model --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"
    )
    args = validated(flags, model_family="mamba").variant(padded_vocab_size=50304)
    assert num_floating_point_operations(args, 8) == 5811090751488
