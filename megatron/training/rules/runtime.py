"""Rules about processes, seeds, intervals and trackers."""

from __future__ import annotations

import argparse
import importlib.util
import os

from megatron.core.communicators import plan_communicators, require_network_reduction
from megatron.core.device import device_type
from megatron.core.fusions.compiled import why_not_compilable
from megatron.training.logging.energy import why_no_energy
from megatron.training.settings import ConfigurationError, refuse_unless, warn, was_given

POSITIVE = (
    "log_interval",
    "eval_interval",
    "save_interval",
    "exit_interval",
    "exit_duration_in_mins",
    "check_weight_hash_across_dp_replicas_interval",
    "train_sync_interval",
    "tensorboard_log_interval",
    "distributed_timeout_minutes",
    "make_vocab_size_divisible_by",
)
NOT_NEGATIVE = ("eval_iters", "manual_gc_interval", "profile_step_start", "clip_grad")


def choose_distributed_backend(args: argparse.Namespace) -> None:
    """NCCL moves data between CUDA devices only; every other device uses gloo."""
    if device_type() != "cuda" and args.distributed_backend == "nccl":
        refuse_unless(
            not was_given(args, "distributed_backend") or device_type() == "cpu",
            f"--distributed-backend nccl needs CUDA devices, found {device_type()}; use gloo",
        )
        args.distributed_backend = "gloo"


def choose_pipeline_backend(args: argparse.Namespace) -> None:
    """As for all groups: NCCL on a CPU means gloo."""
    if device_type() == "cpu" and args.pipeline_model_parallel_comm_backend == "nccl":
        args.pipeline_model_parallel_comm_backend = None
        warn(args, "--pipeline-model-parallel-comm-backend nccl: this run computes on the CPU and uses gloo")


def require_communicators_available(args: argparse.Namespace) -> None:
    """What single groups ask for is known before any of them is made."""
    path = args.nccl_communicator_config_path
    refuse_unless(path is None or os.path.exists(path), f"--nccl-communicator-config-path {path} does not exist")
    backend, urgent = args.pipeline_model_parallel_comm_backend, args.high_priority_stream_groups
    given = {
        f"--pipeline-model-parallel-comm-backend {backend}": {"pipeline_backend": backend} if backend else None,
        f"--nccl-communicator-config-path {path}": {"config_path": path} if path else None,
        f"--high-priority-stream-groups {' '.join(urgent)}": {"high_priority_groups": urgent} if urgent else None,
    }
    for flag, settings in given.items():
        try:
            plan_communicators(**(settings or {}))
        except ValueError as error:
            raise ConfigurationError(f"{flag}: {error}") from error
    if args.use_sharp:
        require_network_reduction()


def require_cuda_for_its_settings(args: argparse.Namespace) -> None:
    """What looks into a GPU, or returns its memory, has nothing to do elsewhere."""
    kind = device_type()
    refuse_unless(
        args.empty_unused_memory_level == 0 or kind != "cpu",
        f"--empty-unused-memory-level {args.empty_unused_memory_level} returns memory that torch caches on a GPU; this "
        "run computes on the CPU, where none is cached: leave it out",
    )
    refuse_unless(
        not args.record_memory_history or kind == "cuda",
        f"--record-memory-history records allocations on CUDA devices, found {kind}: leave it out",
    )
    if not args.record_memory_history and was_given(args, "memory_snapshot_path"):
        warn(args, "--memory-snapshot-path has no effect without --record-memory-history")
    if args.log_energy:
        missing = why_no_energy()
        refuse_unless(missing is None, f"--log-energy: {missing}; leave it out")


def require_positive_seed(args: argparse.Namespace) -> None:
    """Random streams are numbered from the seed upwards."""
    refuse_unless(args.seed is not None and args.seed > 0, f"--seed ({args.seed}) must be a positive whole number")


def require_sensible_intervals(args: argparse.Namespace) -> None:
    """An interval counts something."""
    for name in POSITIVE:
        value = getattr(args, name)
        refuse_unless(value is None or value > 0, f"--{name.replace('_', '-')} ({value}) must be positive")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        refuse_unless(value >= 0, f"--{name.replace('_', '-')} ({value}) must not be negative")


def require_compiler(args: argparse.Namespace) -> None:
    """A compiler that is missing is named now, not by each rank in its first step."""
    if args.torch_compile:
        missing = why_not_compilable(device_type(), os.environ)
        refuse_unless(missing is None, f"--torch-compile needs {missing}; or leave --torch-compile out")


def require_profile_window(args: argparse.Namespace) -> None:
    """A profile ends after it begins."""
    if args.profile:
        refuse_unless(
            args.profile_step_end > args.profile_step_start,
            f"--profile-step-end ({args.profile_step_end}) must be above --profile-step-start "
            f"({args.profile_step_start})",
        )


def require_timeline_within_run(args: argparse.Namespace) -> None:
    """What is to be recorded happens."""
    if args.timeline:
        last = args.train_iters
        bad = [n for n in args.timeline_step if n < 1 or (last is not None and n > last)]
        refuse_unless(
            args.timeline_step and not bad,
            f"--timeline-step {' '.join(map(str, args.timeline_step))}: iterations from 1 to --train-iters ({last}) "
            "can be recorded",
        )


def require_named_wandb_run(args: argparse.Namespace) -> None:
    """A run on wandb has a name, and the package is there."""
    if args.wandb_project:
        refuse_unless(
            args.wandb_exp_name,
            f"--wandb-project {args.wandb_project} needs --wandb-exp-name, the name of the run",
        )
        refuse_unless(importlib.util.find_spec("wandb"), "--wandb-project needs the package wandb (pip install wandb)")


def derive_metrics_file(args: argparse.Namespace) -> None:
    """Metrics lie beside the checkpoints."""
    if args.metrics_jsonl is None and args.save:
        args.metrics_jsonl = os.path.join(args.save, "metrics.jsonl")


def require_graphs_fit(args: argparse.Namespace) -> None:
    """Graphs hold kernels of one GPU, the same in each step; what the library can tell of that is in its own rules."""
    if args.external_cuda_graph:
        refuse_unless(args.te_rng_tracker, "--external-cuda-graph needs --te-rng-tracker")
    if not args.enable_cuda_graph:
        if was_given(args, "cuda_graph_warmup_steps"):
            warn(args, "--cuda-graph-warmup-steps has no effect without --enable-cuda-graph")
        return
    for used, reason in (
        (getattr(args, "serves_texts", False), "this program does not train, and only training is captured"),
        (args.sft, "--sft packs other sequences into each sample, and shapes are captured"),
        (args.reset_attention_mask, "--reset-attention-mask cuts each sample elsewhere, and shapes are captured"),
        (args.use_torch_fsdp2, "--use-torch-fsdp2 gathers weights elsewhere in each step, and places are captured"),
        (args.timeline, "--timeline marks what a layer does as it does it, which a replay does not"),
        (device_type() != "cuda", f"it captures kernels of CUDA devices, found {device_type()}"),
    ):
        refuse_unless(not used, f"--enable-cuda-graph: {reason}; leave it out")


def require_inference_settings_fit(args: argparse.Namespace) -> None:
    """Pipelined and dynamic inference have limits of their own."""
    if args.inference_batch_times_seqlen_threshold > -1:
        refuse_unless(
            args.pipeline_model_parallel_size > 1 and not args.enable_cuda_graph,
            "--inference-batch-times-seqlen-threshold needs --pipeline-model-parallel-size above 1 and "
            "excludes --enable-cuda-graph",
        )
    if args.inference_dynamic_batching:
        size = args.inference_dynamic_batching_chunk_size
        refuse_unless(size % 256 == 0, f"--inference-dynamic-batching-chunk-size ({size}) must be a multiple of 256")


RUNTIME_RULES = (
    choose_distributed_backend,
    choose_pipeline_backend,
    require_communicators_available,
    require_cuda_for_its_settings,
    require_positive_seed,
    require_sensible_intervals,
    require_compiler,
    require_profile_window,
    require_timeline_within_run,
    require_named_wandb_run,
    derive_metrics_file,
    require_graphs_fit,
    require_inference_settings_fit,
)
