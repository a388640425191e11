"""Operations of a training step: tabled numbers, and the matrix products that a real model runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.flops import num_floating_point_operations
from megatron.training.rules.hybrid import sizes_of
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


# -- a whole training step, traced -----------------------------------------------------------------------

SWIGLU = "--swiglu --ffn-hidden-size 192 --disable-bias-linear --normalization RMSNorm --position-embedding-type rope"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-router-load-balancing-type none"
LATENT = (
    "--multi-latent-attention --kv-lora-rank 32 --q-lora-rank 48 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 16 --position-embedding-type rope"
)
HYBRID = (
    "--is-hybrid-model --hybrid-override-pattern M*M- --mamba-head-dim 32 --mamba-num-groups 2 --mamba-state-dim 32 "
    "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"
)
WIDE = "--hidden-size 256 --untie-embeddings-and-output-weights"
TRACED = {
    "as many keys as queries": WIDE,
    "grouped queries": f"{WIDE} --group-query-attention --num-query-groups 2",
    "SwiGLU": f"{WIDE} {SWIGLU}",
    "experts": f"{WIDE} {SWIGLU} {EXPERTS}",
    "experts, one by one": f"{WIDE} {EXPERTS} --disable-bias-linear --moe-layer-freq 2",
    "grouped experts, a shared one": f"{WIDE} {EXPERTS} --moe-grouped-gemm --moe-shared-expert-intermediate-size 128 "
    "--disable-bias-linear",
    "latent attention": f"{WIDE} {LATENT}",
    "a hybrid": f"{WIDE} {HYBRID}",
}


def built(args: Any) -> torch.nn.Module:
    """The model that the settings describe."""
    config = core_transformer_config_from_args(args)
    shape: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.seq_length,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
    }
    if getattr(args, "model_family", None) == "mamba":
        pattern = {"hybrid_override_pattern": args.hybrid_override_pattern}
        return MambaModel(config, mamba_stack_spec, **pattern, **shape)
    return GPTModel(config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), **shape)


def inside(model: torch.nn.Module, counter: FlopCounterMode, ending: str) -> float:
    """Operations counted in the modules of such names."""
    kind, counts = type(model).__name__, counter.get_flop_counts()
    names = [name for name, _ in model.named_modules() if name.endswith(ending)]
    return float(sum(sum(counts[f"{kind}.{name}"].values()) for name in names))


def product_added(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Operations of `addmm_`, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def product_by_onednn(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Operations of fp32 products on a CPU."""
    return 2 * math.prod(a) * b[0]


@pytest.mark.parametrize("flags", TRACED.values(), ids=TRACED)
def test_traced_training_step(flags: str) -> None:
    """Within 1 % of what torch counts in forward and backward, of attention the half that causality needs.

    Left out of both is a mixer's recurrence: the formula has the fewest operations, torch those of chunks.
    """
    family = {"model_family": "mamba"} if "--is-hybrid-model" in flags else {}
    args = validated(f"{flags} --attention-backend unfused", **family).variant(padded_vocab_size=512)
    model, batch_size = built(args).eval(), 2
    tokens = torch.arange(batch_size * args.seq_length).view(batch_size, -1) % args.padded_vocab_size
    positions = torch.arange(args.seq_length).expand_as(tokens)
    known = {torch.ops.aten.addmm_: product_added, torch.ops.mkldnn._linear_pointwise: product_by_onednn}
    with FlopCounterMode(model, display=False, depth=9, custom_mapping=known) as counter:
        model(tokens, positions, None, labels=tokens).sum().backward()
    whole = inside(model, counter, "core_attention")
    traced = counter.get_total_flops() - whole / 2
    expected = num_floating_point_operations(args, batch_size)
    left_out = num_floating_point_operations(args, batch_size, whole_attention=True) - expected
    if args.multi_latent_attention:  # its values are made as wide as its keys
        assert 0 < left_out < whole / 2
    else:
        assert left_out == whole / 2 > 0
    if family:
        projections = inside(model, counter, "mixer.in_proj") + inside(model, counter, "mixer.out_proj")
        assert projections > 0
        traced -= inside(model, counter, "mixer") - projections
        sizes, mixers = sizes_of(args), args.hybrid_override_pattern.count("M")
        expected -= 3 * 7 * mixers * batch_size * args.seq_length * sizes.inner * sizes.state
    assert expected == pytest.approx(traced, rel=0.01)
