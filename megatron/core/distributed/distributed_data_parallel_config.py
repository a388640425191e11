"""How gradients and sharded weights travel between data parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_rules import require, require_one_of, require_together, shown
from megatron.core.not_built import refuse_fields_not_built


@dataclass
class DistributedDataParallelConfig:
    """Settings of `DistributedDataParallel`. Each field's docstring is also its flag's help."""

    grad_reduce_in_fp32: bool = False
    """Keep and reduce gradients in float32."""
    overlap_grad_reduce: bool = False
    """Reduce gradient buckets while backward still runs."""
    overlap_param_gather: bool = False
    """Gather sharded weights while forward already runs."""
    align_param_gather: bool = False
    """All pipeline stages start gathering weights at the same time."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state and work over the data parallel ranks (ZeRO, stage 1)."""
    num_distributed_optimizer_instances: int = 1
    """Replicas of that sharded state within the data parallel ranks."""
    check_for_nan_in_grad: bool = False
    """Stop on NaN or infinite gradients before they are reduced."""
    check_for_large_grads: bool = False
    """Stop on unexpectedly large gradients."""
    bucket_size: int | None = None
    """Elements per gradient bucket; unset is a single bucket."""
    pad_buckets_for_high_nccl_busbw: bool = False
    """Pad buckets to a large power of two, which NCCL moves fastest."""
    average_in_collective: bool = False
    """Let the collective average gradients instead of scaling them beforehand."""
    fp8_param_gather: bool = False
    """Keep and gather the weights of linear layers in fp8 (with `TransformerConfig.fp8_param`)."""
    reuse_grad_buf_for_mxfp8_param_ag: bool = False
    """Gather mxfp8 weights through the gradient buffer."""
    use_custom_fsdp: bool = False
    """Shard data parallel state with this library's fully sharded data parallelism."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = "no_shard"
    """What fully sharded data parallelism splits: nothing, optimizer state, also gradients, also weights."""
    gradient_reduce_div_fusion: bool = True
    """Fold the division by the number of ranks into the reduction (fully sharded)."""
    suggested_communication_unit_size: int | None = None
    """Elements per transfer (fully sharded)."""
    preserve_fp32_weights: bool = True
    """Keep float32 main weights beside the sharded ones (fully sharded)."""
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool = False
    """Keep transposed fp8 weights between uses (fully sharded)."""
    nccl_ub: bool = False
    """Register the communication buffers with NCCL."""
    fsdp_double_buffer: bool = False
    """Gather into two buffers in turn (fully sharded)."""

    def __post_init__(self) -> None:
        for rule in (
            refuse_fields_not_built,
            require_known_sharding_strategy,
            require_overlap_fits,
            require_positive_bucket_size,
            require_fp8_for_buffer_reuse,
            require_sharded_weights_for_fp8,
        ):
            rule(self)


def require_known_sharding_strategy(config: DistributedDataParallelConfig) -> None:
    """Four things can be sharded."""
    require_one_of(
        config, "data_parallel_sharding_strategy", ("no_shard", "optim", "optim_grads", "optim_grads_params")
    )


def require_overlap_fits(config: DistributedDataParallelConfig) -> None:
    """Only the distributed optimizer has weights to gather."""
    require_together(config, "overlap_param_gather", "use_distributed_optimizer", "overlap_grad_reduce")


def require_positive_bucket_size(config: DistributedDataParallelConfig) -> None:
    """A bucket holds something."""
    if config.bucket_size is not None:
        require(config.bucket_size > 0, f"{shown(config, 'bucket_size')} must be positive, or None for one bucket")


def require_fp8_for_buffer_reuse(config: DistributedDataParallelConfig) -> None:
    """The gradient buffer can stand in only for fp8 weights, which are smaller."""
    require_together(config, "reuse_grad_buf_for_mxfp8_param_ag", "fp8_param_gather")


def require_sharded_weights_for_fp8(config: DistributedDataParallelConfig) -> None:
    """Weights in fp8 are cast from main weights by the ranks that own these."""
    require_together(config, "fp8_param_gather", "use_distributed_optimizer")
