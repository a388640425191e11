"""Rules about the distributed optimizer, overlap of its traffic, and fully sharded data parallelism."""

from __future__ import annotations

import argparse
import os

from megatron.core.device import device_type
from megatron.training.config.flags import all_flags
from megatron.training.settings import refuse_unless, warn

OFFLOAD_SETTINGS = (
    *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload", "overlap_cpu_optimizer_d2h_h2d"),
    *("pin_cpu_grads", "pin_cpu_params"),
)


def imply_overlap_of_sharding(args: argparse.Namespace) -> None:
    """Sharded gradients are reduced, and sharded weights gathered, while layers run."""
    if args.data_parallel_sharding_strategy in ("optim_grads", "optim_grads_params"):
        args.overlap_grad_reduce = True
    if args.data_parallel_sharding_strategy == "optim_grads_params":
        args.overlap_param_gather = True


def require_overlap_param_gather_fits(args: argparse.Namespace) -> None:
    """Only the distributed optimizer has weights to gather, and only overlapped buckets know when."""
    if args.overlap_param_gather:
        refuse_unless(
            args.use_distributed_optimizer and args.overlap_grad_reduce,
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",
        )
    if args.overlap_param_gather_with_optimizer_step:
        refuse_unless(
            args.use_distributed_optimizer
            and args.overlap_param_gather
            and args.virtual_pipeline_model_parallel_size is not None
            and args.ckpt_format == "torch",
            "--overlap-param-gather-with-optimizer-step needs --use-distributed-optimizer, "
            "--overlap-param-gather, model chunks (--num-layers-per-virtual-pipeline-stage) and "
            "--ckpt-format torch",
        )


def require_instances_fit(args: argparse.Namespace) -> None:
    """Each instance of the sharded state spans an equal part of the replicas."""
    count = args.num_distributed_optimizer_instances
    refuse_unless(count >= 1, f"--num-distributed-optimizer-instances ({count}) must be at least 1")
    if count == 1:
        return
    refuse_unless(
        args.use_distributed_optimizer,
        f"--num-distributed-optimizer-instances {count} needs --use-distributed-optimizer, whose state it copies",
    )
    replicas = args.data_parallel_size * args.context_parallel_size
    fitting = [n for n in range(1, replicas + 1) if replicas % n == 0]
    refuse_unless(
        replicas % count == 0,
        f"--num-distributed-optimizer-instances {count} must divide the {replicas} data x context parallel ranks: "
        f"use one of {', '.join(map(str, fitting))}",
    )


def require_torch_fsdp_fits(args: argparse.Namespace) -> None:
    """torch's FSDP2 shards whole layers; nothing else may shard weights or read gradients before it."""
    if not args.use_torch_fsdp2:
        return
    conflicts = {
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size > 1,
        "--num-experts": args.num_experts is not None,
        "--use-distributed-optimizer": args.use_distributed_optimizer,
        "fused gradients (pass --no-gradient-accumulation-fusion)": args.gradient_accumulation_fusion,
        f"--ckpt-format {args.ckpt_format} (use torch_dist or torch_dcp)": args.ckpt_format
        not in ("torch_dist", "torch_dcp"),
        "--fp16": args.fp16,
        "--data-parallel-random-init": args.data_parallel_random_init,
        "--check-for-large-grads": args.check_for_large_grads,
        "--check-weight-hash-across-dp-replicas-interval": bool(args.check_weight_hash_across_dp_replicas_interval),
    }
    found = [name for name, conflict in conflicts.items() if conflict]
    refuse_unless(not found, f"--use-torch-fsdp2 does not work with {', '.join(found)}")
    refuse_single_connection(args, "--use-torch-fsdp2")
    without_effect = (
        *("overlap_grad_reduce", "ddp_bucket_size", "ddp_num_buckets", "ddp_average_in_collective"),
        "ddp_pad_buckets_for_high_nccl_busbw",
    )
    given = [all_flags()[name].names[0] for name in without_effect if getattr(args, name)]
    if given:
        warn(args, f"{' '.join(given)} has no effect with --use-torch-fsdp2, which has its own units of communication")


def require_custom_fsdp_fits(args: argparse.Namespace) -> None:
    """Fully sharded data parallelism builds on the distributed optimizer and owns the gradient buffers."""
    if not args.use_custom_fsdp:
        return
    refuse_unless(args.use_distributed_optimizer, "--use-custom-fsdp needs --use-distributed-optimizer")
    strategy = args.data_parallel_sharding_strategy
    refuse_unless(
        strategy in ("optim", "optim_grads_params"),
        f"--use-custom-fsdp with --data-parallel-sharding-strategy {strategy} "
        + (
            "shards nothing: leave both out"
            if strategy == "no_shard"
            else "is not built: use optim, or optim_grads_params, which splits the weights, too"
        ),
    )
    if strategy == "optim_grads_params":
        refuse_unless(
            not args.gradient_accumulation_fusion,
            f"--data-parallel-sharding-strategy {strategy} needs --no-gradient-accumulation-fusion",
        )
        refuse_unless(
            args.check_weight_hash_across_dp_replicas_interval is None,
            "--check-weight-hash-across-dp-replicas-interval compares whole weights, which "
            "--data-parallel-sharding-strategy optim_grads_params does not keep",
        )
    refuse_single_connection(args, "--use-custom-fsdp")


def choose_form_of_custom_fsdp(args: argparse.Namespace) -> None:
    """The public flags for a fully sharded data parallelism of its own mean what others do here: splitting optimizer
    state is the distributed optimizer, splitting weights is torch's FSDP2."""
    if not args.use_custom_fsdp:
        if args.data_parallel_sharding_strategy != "no_shard":
            warn(args, "--data-parallel-sharding-strategy has no effect without --use-custom-fsdp, but for overlap")
        return
    if args.data_parallel_sharding_strategy == "optim_grads_params":
        args.use_torch_fsdp2 = True
        args.use_distributed_optimizer = args.overlap_grad_reduce = args.overlap_param_gather = False
    args.use_custom_fsdp, args.data_parallel_sharding_strategy = False, "no_shard"


def refuse_single_connection(args: argparse.Namespace, flag: str) -> None:
    """On CUDA, one hardware queue would put gathers behind the layers that they should overlap."""
    if device_type() == "cuda":
        refuse_unless(
            os.getenv("CUDA_DEVICE_MAX_CONNECTIONS") != "1",
            f"{flag} needs the environment variable CUDA_DEVICE_MAX_CONNECTIONS to be unset or above 1",
        )


def require_fp8_gather_fits(args: argparse.Namespace) -> None:
    """Only weights that ranks own in ranges, beside main weights in fp32, are cast and gathered."""
    if args.fp8_param_gather:
        refuse_unless(
            args.use_distributed_optimizer,
            "--fp8-param-gather needs --use-distributed-optimizer; with --use-torch-fsdp2 it is not built",
        )
        refuse_unless(
            not args.use_precision_aware_optimizer,
            "--fp8-param-gather does not work with --use-precision-aware-optimizer, which updates bf16 in place",
        )
        refuse_unless(
            args.fp8_recipe in ("delayed", "tensorwise"),
            f"--fp8-param-gather does not work with --fp8-recipe {args.fp8_recipe}: ranks own ranges that cut through "
            "blocks; use delayed or tensorwise",
        )
        refuse_unless(
            args.gradient_accumulation_fusion,
            "--fp8-param-gather does not work with --no-gradient-accumulation-fusion: it would round gradients to fp8",
        )


def require_offloaded_optimizer_fits(args: argparse.Namespace) -> None:
    """The offloaded optimizer is a form of the precision-aware one."""
    if not args.optimizer_cpu_offload:
        given = [
            flag.names[0] for name in OFFLOAD_SETTINGS if getattr(args, name) != (flag := all_flags()[name]).default
        ]
        if given:
            warn(args, f"{' '.join(given)} has no effect without --optimizer-cpu-offload")
        return
    refuse_unless(
        args.use_precision_aware_optimizer,
        "--optimizer-cpu-offload needs --use-precision-aware-optimizer",
    )
    fraction = args.optimizer_offload_fraction
    refuse_unless(0 <= fraction <= 1, f"--optimizer-offload-fraction ({fraction}) must be between 0 and 1")
    if device_type() == "cpu":
        warn(args, "--optimizer-cpu-offload: this run computes on the CPU, where it costs copies and saves nothing")


def require_bucket_settings_fit(args: argparse.Namespace) -> None:
    """The number of buckets and their size say the same thing."""
    refuse_unless(
        args.ddp_num_buckets is None or args.ddp_bucket_size is None,
        f"--ddp-num-buckets ({args.ddp_num_buckets}) and --ddp-bucket-size ({args.ddp_bucket_size}) exclude "
        "each other; give one of them",
    )
    for name in ("ddp_num_buckets", "ddp_bucket_size"):
        value = getattr(args, name)
        refuse_unless(value is None or value > 0, f"--{name.replace('_', '-')} ({value}) must be positive")


SHARDING_RULES = (
    imply_overlap_of_sharding,
    require_overlap_param_gather_fits,
    require_instances_fit,
    require_custom_fsdp_fits,
    choose_form_of_custom_fsdp,
    require_torch_fsdp_fits,
    require_fp8_gather_fits,
    require_offloaded_optimizer_fits,
    require_bucket_settings_fit,
)
