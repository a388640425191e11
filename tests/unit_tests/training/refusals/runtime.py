"""Refusals of the rules about the machine, logging and inference."""

from __future__ import annotations

from megatron.training.rules import runtime
from tests.unit_tests.training.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        runtime.require_communicators_available,
        "--nccl-communicator-config-path nowhere.yaml does not exist",
        "--nccl-communicator-config-path nowhere.yaml",
    ),
    Refusal(
        runtime.require_communicators_available,
        "--high-priority-stream-groups dp_cp everything: there is no process group 'everything'",
        "--high-priority-stream-groups dp_cp everything",
    ),
    Refusal(
        runtime.require_communicators_available,
        "need NCCL as the backend, found gloo; leave them out",
        "--high-priority-stream-groups dp_cp",
    ),
    Refusal(runtime.require_communicators_available, "needs NCCL on a network that reduces", "--use-sharp"),
    Refusal(
        runtime.require_cuda_for_its_settings,
        "this run computes on the CPU, where none is cached",
        "--empty-unused-memory-level 2",
    ),
    Refusal(
        runtime.require_cuda_for_its_settings,
        "records allocations on CUDA devices, found cpu",
        "--record-memory-history",
    ),
    Refusal(
        runtime.require_cuda_for_its_settings,
        "--log-energy: energy is counted by NVIDIA's driver, and this run computes on cpu",
        "--log-energy",
    ),
    Refusal(
        runtime.require_timeline_within_run,
        r"--timeline-step 2 11: iterations from 1 to --train-iters \(10\) can be recorded",
        "--timeline x --timeline-step 2 11",
    ),
    Refusal(runtime.require_positive_seed, "must be a positive whole number", "--seed 0"),
    Refusal(runtime.require_sensible_intervals, r"--log-interval \(0\) must be positive", "--log-interval 0"),
    Refusal(runtime.require_sensible_intervals, "must not be negative", "--manual-gc-interval -1"),
    Refusal(
        runtime.require_profile_window,
        "must be above --profile-step-start",
        "--profile --profile-step-start 5 --profile-step-end 5",
    ),
    Refusal(runtime.require_named_wandb_run, "needs --wandb-exp-name", "--wandb-project p"),
    Refusal(runtime.require_graphs_fit, "needs --te-rng-tracker", values={"external_cuda_graph": True}),
    Refusal(
        runtime.require_graphs_fit,
        "--enable-cuda-graph: it captures kernels of CUDA devices, found cpu; leave it out",
        "--enable-cuda-graph --hidden-dropout 0 --attention-dropout 0",
    ),
    Refusal(
        runtime.require_graphs_fit,
        "--enable-cuda-graph: --reset-attention-mask cuts each sample elsewhere",
        "--enable-cuda-graph --reset-attention-mask --hidden-dropout 0 --attention-dropout 0",
    ),
    Refusal(
        runtime.require_graphs_fit,
        "--enable-cuda-graph: this program does not train",
        values={"enable_cuda_graph": True, "serves_texts": True},
    ),
    Refusal(
        runtime.require_inference_settings_fit,
        "needs --pipeline-model-parallel-size above 1",
        values={"inference_batch_times_seqlen_threshold": 5},
    ),
    Refusal(
        runtime.require_inference_settings_fit,
        "must be a multiple of 256",
        values={"inference_dynamic_batching": True, "inference_dynamic_batching_chunk_size": 100},
    ),
]
