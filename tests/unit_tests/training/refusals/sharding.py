"""Refusals of the rules about what is sharded over data-parallel ranks."""

from __future__ import annotations

from megatron.training.rules import sharding
from tests.unit_tests.training.refusals.refusal import Refusal

PRECISION_AWARE = "--use-distributed-optimizer --use-precision-aware-optimizer"

FP8_GATHER = "--bf16 --fp8-format hybrid --fp8-param-gather"

REFUSALS = [
    Refusal(
        sharding.require_offloaded_optimizer_fits, "needs --use-precision-aware-optimizer", "--optimizer-cpu-offload"
    ),
    Refusal(
        sharding.require_offloaded_optimizer_fits,
        r"--optimizer-offload-fraction \(2.0\) must be between 0 and 1",
        f"{PRECISION_AWARE} --optimizer-cpu-offload --optimizer-offload-fraction 2",
    ),
    Refusal(sharding.require_bucket_settings_fit, "exclude each", "--ddp-num-buckets 2 --ddp-bucket-size 3"),
    Refusal(sharding.require_bucket_settings_fit, "must be positive", "--ddp-num-buckets 0"),
    Refusal(
        sharding.require_instances_fit,
        "needs --use-distributed-optimizer",
        values={"num_distributed_optimizer_instances": 2},
    ),
    Refusal(
        sharding.require_instances_fit,
        "must divide the 6 data x context parallel ranks: use one of 1, 2, 3, 6",
        values={"num_distributed_optimizer_instances": 4, "use_distributed_optimizer": True, "data_parallel_size": 6},
    ),
    Refusal(
        sharding.require_overlap_param_gather_fits,
        "needs --use-distributed-optimizer and --overlap-grad-reduce",
        values={"overlap_param_gather": True},
    ),
    Refusal(
        sharding.require_overlap_param_gather_fits,
        "and --ckpt-format torch",
        values={"overlap_param_gather_with_optimizer_step": True},
    ),
    Refusal(
        sharding.require_torch_fsdp_fits,
        "does not work with fused gradients .*--fp16",
        values={"use_torch_fsdp2": True, "fp16": True},
    ),
    Refusal(sharding.require_custom_fsdp_fits, "needs --use-distributed-optimizer", values={"use_custom_fsdp": True}),
    Refusal(
        sharding.require_custom_fsdp_fits,
        "optim_grads is not built: use optim, or optim_grads_params",
        values={
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads",
        },
    ),
    Refusal(
        sharding.require_custom_fsdp_fits,
        "no_shard shards nothing: leave both out",
        values={"use_custom_fsdp": True, "use_distributed_optimizer": True},
    ),
    Refusal(
        sharding.require_custom_fsdp_fits,
        "needs --no-gradient-accumulation-fusion",
        values={
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "data_parallel_sharding_strategy": "optim_grads_params",
        },
    ),
    Refusal(
        sharding.require_custom_fsdp_fits,
        "compares whole weights",
        values={
            "use_custom_fsdp": True,
            "use_distributed_optimizer": True,
            "gradient_accumulation_fusion": False,
            "check_weight_hash_across_dp_replicas_interval": 2,
            "data_parallel_sharding_strategy": "optim_grads_params",
        },
    ),
    Refusal(
        sharding.require_fp8_gather_fits,
        "needs --use-distributed-optimizer; with --use-torch-fsdp2 it is not built",
        FP8_GATHER,
    ),
    Refusal(
        sharding.require_fp8_gather_fits,
        "does not work with --use-precision-aware-optimizer",
        f"{FP8_GATHER} --use-distributed-optimizer --use-precision-aware-optimizer",
    ),
    Refusal(
        sharding.require_fp8_gather_fits,
        "does not work with --fp8-recipe blockwise: .*; use delayed or tensorwise",
        f"{FP8_GATHER} --use-distributed-optimizer --fp8-recipe blockwise",
    ),
    Refusal(
        sharding.require_fp8_gather_fits,
        "does not work with --no-gradient-accumulation-fusion",
        f"{FP8_GATHER} --use-distributed-optimizer --no-gradient-accumulation-fusion",
    ),
]
