"""From a command line to a program that is ready to build its model."""

from __future__ import annotations

import datetime
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.collectives import all_reduce
from megatron.core.host_memory import keep_freed_memory
from megatron.core.stage_placement import placement_shape
from megatron.core.tensor_parallel.initialization import set_initialization_seed
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.explain import explain_and_exit_if_asked, print_args
from megatron.training.failure.start import start_failure_watch, stop_failure_watch
from megatron.training.global_vars import get_args, get_tokenizer, get_trackers, set_global_variables, set_trackers
from megatron.training.logging.trackers import open_trackers
from megatron.training.settings import configuration_errors_end_the_program
from megatron.training.tokenizer import vocab_size_with_padding
from megatron.training.utils import is_last_rank, print_rank_0


def initialize_megatron(
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
    ignore_unknown_args: bool = False,
    allow_no_cuda: bool = True,
    skip_mpu_initialization: bool = False,
    get_embedding_ranks: Callable[..., list[int]] | None = None,
    get_position_embedding_ranks: Callable[..., list[int]] | None = None,
    parsed_args: Any = None,
    store: Any = None,
    for_training: bool = False,
) -> None:
    """Parse and check the flags, build the tokenizer, start torch.distributed and seed everything.

    Nothing outside this process is touched before the whole configuration has been checked. Afterwards
    `get_args()` is read-only.

    Args:
        args_defaults: values for flags that the user did not set.
        for_training: the program trains, so that the length of the run and a learning rate are required.
        allow_no_cuda: accepted for programs written elsewhere; the CPU is a device like any other here.
    """
    with configuration_errors_end_the_program():
        args = parsed_args or parse_args(extra_args_provider, ignore_unknown_args)
        if args.use_checkpoint_args or hf_directory(args.load) is not None:
            load_args_from_checkpoint(args)
        validate_args(args, args_defaults or {}, for_training=for_training)
    explain_and_exit_if_asked(args)
    _setup_logging(args)
    set_global_variables(args)
    if for_training and device.is_cpu():
        keep_freed_memory()
    _set_padded_vocab_size(args)
    if skip_mpu_initialization:
        args.freeze()
        return
    if args.rank == 0:
        print_args(args)
    is_own = _initialize_distributed(args, store)
    if is_own and for_training:
        start_failure_watch(60.0 * args.distributed_timeout_minutes, heeds_sigterm=not args.exit_signal_handler)
    _initialize_model_parallel(args, get_embedding_ranks, get_position_embedding_ranks)
    _set_random_seed(args)
    _set_determinism(args)
    args.freeze()
    set_trackers(open_trackers(args) if is_last_rank() else None)


def _setup_logging(args: Any) -> None:
    level = args.logging_level
    if level is None:
        level = os.getenv("MEGATRON_LOGGING_LEVEL", logging.INFO)
    logging.basicConfig(level=int(level) if str(level).isdigit() else level, format="%(message)s")
    # Third-party libraries talk at INFO about things that no user of this program asked for.
    for chatty in ("matplotlib", "torch.distributed", "fsspec", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _set_padded_vocab_size(args: Any) -> None:
    """The vocabulary rounded up to what divides over the ranks; a checkpoint may have set it."""
    tokenizer = get_tokenizer()
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the checkpoint's padded vocabulary ({args.padded_vocab_size}) is smaller than the tokenizer's vocabulary "
            f"({tokenizer.vocab_size}): this is not the tokenizer that the model was trained with"
        )
    if args.padded_vocab_size is None:
        args.padded_vocab_size = vocab_size_with_padding(
            tokenizer.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    dummies = args.padded_vocab_size - tokenizer.vocab_size
    if args.rank == 0:
        print(
            f" > padded vocab (size: {tokenizer.vocab_size}) with {dummies} dummy tokens "
            f"(new size: {args.padded_vocab_size})",
            flush=True,
        )


def _initialize_distributed(args: Any, store: Any) -> bool:
    """Whether torch.distributed is this program's own, and not started by a host program or a test."""
    device.set_device(args.local_rank)
    if dist.is_initialized():
        return False
    if args.rank == 0:
        print("> initializing torch distributed ...", flush=True)
    if "MASTER_ADDR" not in os.environ and args.world_size == 1:  # started without torchrun
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        store = store or dist.HashStore()
    dist.init_process_group(
        backend="gloo" if device.is_cpu() else f"cpu:gloo,{device.device_type()}:{args.distributed_backend}",
        world_size=args.world_size,
        rank=args.rank,
        store=store,
        timeout=datetime.timedelta(minutes=args.distributed_timeout_minutes),
    )
    return True


def _initialize_model_parallel(
    args: Any,
    get_embedding_ranks: Callable[..., list[int]] | None,
    get_position_embedding_ranks: Callable[..., list[int]] | None,
) -> None:
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        encoder_pipeline_model_parallel_size=args.encoder_pipeline_model_parallel_size,
        pipeline_model_parallel_comm_backend=args.pipeline_model_parallel_comm_backend,
        use_sharp=args.use_sharp,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        high_priority_stream_groups=args.high_priority_stream_groups,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        virtual_pipeline_shape=placement_shape(args.pipeline_schedule),
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
    )
    print_rank_0(
        f"> initialized tensor model parallel with size {parallel_state.get_tensor_model_parallel_world_size()}\n"
        f"> initialized pipeline model parallel with size {parallel_state.get_pipeline_model_parallel_world_size()}"
    )


def _set_random_seed(args: Any) -> None:
    """Stages draw different dropout (seed + 100 × stage); initial weights derive from the plain seed."""
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    if args.data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    set_initialization_seed(seed - 100 * parallel_state.get_pipeline_model_parallel_rank())
    print_rank_0(f"> setting random seeds to {args.seed} ...")


def _set_determinism(args: Any) -> None:
    if args.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


_start = time.time()


def program_start() -> float:
    """Unix time at which the earliest rank started. Communicates: all-reduce."""
    earliest = torch.tensor([_start], dtype=torch.float64, device=device.current_device())
    all_reduce(earliest, dist.ReduceOp.MIN, what="start times")
    return float(earliest)


def print_datetime(what: str) -> None:
    """`[what] datetime: …` on rank 0, after all ranks have come here."""
    parallel_state.barrier()
    print_rank_0(f"[{what}] datetime: {datetime.datetime.now():%Y-%m-%d %H:%M:%S} ")


def close_program() -> None:
    """Finish the trackers and leave the process groups."""
    trackers = get_trackers()
    if trackers is not None:
        trackers.close()
    parallel_state.barrier()
    stop_failure_watch()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


__all__ = ["close_program", "get_args", "initialize_megatron", "print_datetime", "program_start"]
