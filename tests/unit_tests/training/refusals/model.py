"""Refusals of the rules about the model."""

from __future__ import annotations

from megatron.training.rules import model
from tests.unit_tests.training.refusals.refusal import Refusal

LOSS_IN_PIECES = "--cross-entropy-fusion-impl linear"
UPCYCLING = {
    "moe_use_upcycling": True,
    "moe_upcycling_granularity": 2,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 128,
    "ffn_hidden_size": 256,
}

REFUSALS = [
    Refusal(model.require_loss_in_pieces_fits, "needs --cross-entropy-loss-fusion", LOSS_IN_PIECES),
    Refusal(model.derive_num_layers, "mean the same", "--encoder-num-layers 3"),
    Refusal(
        model.require_model_sizes,
        "--hidden-size, --num-attention-heads, --max-position-embeddings missing",
        "",
        base="--num-layers 2 --micro-batch-size 1",
    ),
    Refusal(model.require_model_sizes, r"--num-layers \(0\) must be positive", "--num-layers 0"),
    Refusal(model.derive_kv_channels, r"--hidden-size \(65\) must be divisible", "--hidden-size 65"),
    Refusal(model.require_heads_fit, "must be divisible", "--group-query-attention --num-query-groups 3"),
    Refusal(model.require_heads_fit, "needs --group-query-attention", "--num-query-groups 2"),
    Refusal(model.require_latent_settings, "only --multi-latent-attention reads that", "--kv-lora-rank 8"),
    Refusal(
        model.require_latent_settings,
        "has no groups of heads",
        "--multi-latent-attention --group-query-attention --num-query-groups 2",
    ),
    Refusal(
        model.require_latent_settings,
        "--use-rope-scaling would do nothing",
        "--multi-latent-attention --position-embedding-type rope --use-rope-scaling",
    ),
    Refusal(model.require_further_prediction_fits, "needs --mtp-num-layers", "--mtp-loss-scaling-factor 0.3"),
    Refusal(model.require_one_activation, "exclude each other", "--swiglu --squared-relu"),
    Refusal(model.imply_rope, "exclude each other", "--use-rotary-position-embeddings --position-embedding-type none"),
    Refusal(
        model.require_interleaved_rope_fits,
        "--rotary-interleaved needs --no-rope-fusion",
        "--rotary-interleaved --position-embedding-type rope",
    ),
    Refusal(model.require_rope_without_positions, "needs --position-embedding-type", "--no-position-embedding"),
    Refusal(model.require_position_settings, "needs --yarn-rotary-scaling-factor", "--position-embedding-type yarn"),
    Refusal(model.require_position_settings, "need --position-embedding-type yarn", "--yarn-rotary-scaling-factor 4"),
    Refusal(model.require_position_settings, "needs --position-embedding-type rope", "--use-rope-scaling"),
    Refusal(model.require_position_settings, "must be above 0", "--rotary-percent 0"),
    Refusal(model.choose_flash_attention, "needs a CUDA device and the package flash-attn", "--use-flash-attn"),
    Refusal(
        model.choose_flash_attention,
        "--attention-backend unfused exclude each other",
        "--use-flash-attn --attention-backend unfused",
    ),
    Refusal(
        model.require_heads_fit,
        r"--num-attention-heads \(4\) must be div",
        "--tensor-model-parallel-size 8",
        world_size=8,
    ),
    Refusal(
        model.require_heads_fit,
        r"--num-query-groups \(2\) must be divisible by --tensor-model-parallel-size \(4\)",
        "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
        world_size=4,
    ),
    Refusal(model.require_position_settings, "needs --mrope-section", values={"position_embedding_type": "mrope"}),
    Refusal(model.derive_num_experts, "--spec exclude each other", values={"num_experts": 2, "spec": ["local"]}),
    Refusal(model.require_experts_fit_ranks, "needs --num-experts", values={"expert_model_parallel_size": 2}),
    Refusal(
        model.require_experts_fit_ranks,
        r"--num-experts \(3\) must be divisible",
        values={"expert_model_parallel_size": 2, "num_experts": 3},
    ),
    Refusal(
        model.require_experts_fit_ranks,
        "use --bf16",
        values={"expert_model_parallel_size": 2, "num_experts": 2, "fp16": True},
    ),
    Refusal(model.require_upcycling_fits, "needs --num-experts", values={**UPCYCLING, "num_experts": None}),
    Refusal(
        model.require_upcycling_fits, "nothing to make", values={**UPCYCLING, "moe_shared_expert_intermediate_size": 8}
    ),
    Refusal(model.require_upcycling_fits, r"--num-experts \(5\) must be div", values={**UPCYCLING, "num_experts": 5}),
    Refusal(model.require_upcycling_fits, r"--moe-router-topk \(3\)", values={**UPCYCLING, "moe_router_topk": 3}),
    Refusal(model.require_upcycling_fits, r"must be --ffn-hid", values={**UPCYCLING, "moe_ffn_hidden_size": 16}),
    Refusal(model.require_upcycling_fits, "must be positive", values={"moe_upcycling_granularity": 0}),
    Refusal(model.require_upcycling_fits, "only --moe-use-upc", values={"moe_upcycling_granularity": 2}),
    Refusal(
        model.require_further_prediction_fits,
        "needs --position-embedding-type rope, yarn, none, found learned_absolute",
        values={"mtp_num_layers": 1},
    ),
]
