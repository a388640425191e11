"""Building what a run needs: model, optimizer, schedule, data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron.core import device, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    TorchFullyShardedDataParallel,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.initialization import materialize_parameters
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.datasets.filled_up import FilledUp
from megatron.training.evaluation import HeldOut
from megatron.training.global_vars import get_args, get_timers
from megatron.training.library_configs import ddp_config_from_args, optimizer_config_from_args
from megatron.training.nan_check import RememberingIterator
from megatron.training.settings import refuse_unless
from megatron.training.train_state import TrainState
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

DatasetProvider = Callable[[list[int | None]], tuple[Any, Any, Any]]
Batches = Iterator[Any] | list[Iterator[Any]] | None
"""Microbatches of one data set: one iterator, or one for each of several model chunks; None where nothing is read."""


def get_model(
    model_provider_func: Callable[..., nn.Module],
    model_type: ModelType = ModelType.encoder_or_decoder,
    wrap_with_ddp: bool = True,
) -> list[nn.Module]:
    """This rank's model chunks, ready to train: built, moved, cast, wrapped; one without virtual pipeline stages."""
    args = get_args()
    model = _build_chunks(model_provider_func)
    for chunk in model:
        for param in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(param)
    _print_size(model)
    num_parameters = sum(param.numel() for chunk in model for param in chunk.parameters())
    shards_parameters = wrap_with_ddp and args.use_torch_fsdp2
    for i, chunk in enumerate(model):
        if not args.init_model_with_meta_device:
            chunk.to(device.current_device())
        elif not shards_parameters:  # who shards them allocates this rank's part only
            materialize_parameters(chunk, getattr(chunk, "global_parameter_name", str))
        if args.fp16 or args.bf16:
            chunk = Float16Module(get_model_config(chunk), chunk)
        if wrap_with_ddp:
            chunk = _wrap_in_data_parallel(chunk, num_parameters, is_first_chunk=i == 0)
        model[i] = chunk
    return model


def _build_chunks(model_provider_func: Callable[..., nn.Module]) -> list[nn.Module]:
    num_chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    decoder_start = parallel_state.get_pipeline_model_parallel_decoder_start()
    if decoder_start is not None:
        return [_build_stage_of_a_stack(model_provider_func, decoder_start)]
    if num_chunks is None:
        return [
            model_provider_func(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        ]
    taken = inspect.signature(model_provider_func).parameters
    refuse_unless(
        "vp_stage" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values()),
        f"{num_chunks} virtual stages on each pipeline rank: the program's model provider takes no vp_stage, which "
        "tells its chunks apart",
    )
    model = []
    for chunk in range(num_chunks):
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        model.append(
            model_provider_func(
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                vp_stage=chunk,
            )
        )
    return model


def _build_stage_of_a_stack(model_provider_func: Callable[..., nn.Module], decoder_start: int) -> nn.Module:
    """A stage of the encoder, or of the decoder behind it; both have a first and a last stage."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return model_provider_func(
        pre_process=rank in (0, decoder_start),
        post_process=rank == decoder_start - 1 or parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_inside_encoder(),
        add_decoder=parallel_state.is_inside_decoder(),
    )


def _wrap_in_data_parallel(chunk: nn.Module, num_parameters: int, *, is_first_chunk: bool) -> nn.Module:
    """`chunk` in the form of data parallelism that the flags ask for."""
    args, config = get_args(), get_model_config(chunk)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    ddp_config = ddp_config_from_args(args, num_parameters=num_parameters, dp_cp_size=replicas)
    if args.use_torch_fsdp2:
        return TorchFullyShardedDataParallel(config, ddp_config, chunk)
    wrapped = DistributedDataParallel(
        config=config,
        ddp_config=ddp_config,
        module=chunk,
        # Only the first chunk is the last in backward: the others' traffic hides behind it as a whole.
        disable_bucketing=not is_first_chunk or args.overlap_param_gather_with_optimizer_step,
    )
    if args.data_parallel_random_init:
        wrapped.broadcast_params()
    return wrapped


def _print_size(model: list[nn.Module]) -> None:
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        count = sum(param.numel() for chunk in model for param in chunk.parameters())
        print(f" > number of parameters on (tensor, pipeline) model parallel rank {place}: {count}", flush=True)


def setup_model_and_optimizer(
    model_provider_func: Callable[..., nn.Module],
    model_type: ModelType,
    no_wd_decay_cond: Callable[..., bool] | None = None,
    scale_lr_cond: Callable[..., bool] | None = None,
    lr_mult: float = 1.0,
) -> tuple[list[nn.Module], Any, OptimizerParamScheduler]:
    """Model, optimizer and schedule, as initialised (no checkpoint loaded)."""
    args = get_args()
    model = get_model(model_provider_func, model_type)
    config = replace(optimizer_config_from_args(args), timers=get_timers())
    optimizer = get_megatron_optimizer(config, model, no_wd_decay_cond, scale_lr_cond, lr_mult)
    connect(model, optimizer)
    return model, optimizer, get_optimizer_param_scheduler(optimizer)


def connect(model: list[nn.Module], optimizer: Any) -> None:
    """Tell the schedules how to scale the loss, finish gradients and measure."""
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    config.timers = get_timers()
    config.no_sync_func = one_or_list([chunk.no_sync for chunk in model])
    args = get_args()
    if args.overlap_grad_reduce and args.align_grad_reduce and args.transformer_pipeline_model_parallel_size > 1:
        config.grad_sync_func = one_or_list([chunk.start_grad_sync for chunk in model])
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = one_or_list([chunk.start_param_sync for chunk in model])


def one_or_list(functions: list[Any]) -> Any:
    """What schedules take: a function, or a list with one for each model chunk where there are several."""
    return functions[0] if len(functions) == 1 else functions


def get_optimizer_param_scheduler(optimizer: Any) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay; its steps count samples."""
    args = get_args()
    if args.train_samples is None:
        batch = args.global_batch_size
        decay = args.lr_decay_iters * batch
        wsd = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
        warmup, wd_steps = args.lr_warmup_iters * batch, args.train_iters * batch
    else:
        decay, wsd = args.lr_decay_samples, args.lr_wsd_decay_samples
        warmup, wd_steps = args.lr_warmup_samples, args.train_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=wd_steps,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


# --- data ---


def get_train_valid_test_num_samples() -> tuple[int, int | None, int]:
    """Samples that training, validation (None: all of its data) and the test need at most."""
    args = get_args()
    batch = args.global_batch_size
    train = args.train_samples if args.train_samples else args.train_iters * batch
    evaluations = args.train_iters // args.eval_interval + 1
    valid = None if args.full_validation else evaluations * args.eval_iters * batch
    return train, valid, args.eval_iters * batch


def build_train_valid_test_datasets(provider: DatasetProvider) -> tuple[Any, Any, Any]:
    """The three data sets, None where this rank reads none; of validation a list where there are several."""
    train, valid, test = get_train_valid_test_num_samples()
    print_rank_0(
        " > datasets target sizes (minimum size):\n"
        f"    train:      {train}\n    validation: {'all' if valid is None else valid}\n    test:       {test}"
    )
    return provider([train, valid, test])


def build_train_valid_test_data_iterators(
    provider: DatasetProvider, state: TrainState
) -> tuple[Batches, list[HeldOut], list[HeldOut]]:
    """Iterator over microbatches of this data parallel rank, from where `state` stands (None where nothing is read),
    and what to validate and test on, which is the same on all ranks. Communicates: broadcasts from rank 0."""
    args = get_args()
    print_rank_0("> building train, validation, and test datasets ...")
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    train, valid, test = None, None, None
    if reads or getattr(provider, "is_distributed", False):
        train, valid, test = build_train_valid_test_datasets(provider)
    consumed_valid = 0 if args.skip_train or args.full_validation else state.consumed_valid_samples
    names = _names_of_validation_sets() if args.multiple_validation_sets else [""]
    valid_sets = valid if isinstance(valid, list) else [valid]
    return (
        _iterate(train, state.consumed_train_samples) if not args.skip_train else None,
        _held_out(valid_sets, names, consumed_valid, to_the_end=args.full_validation),
        _held_out([test], [""], 0),
    )


def _names_of_validation_sets() -> list[str]:
    """The last part of each path, or all of it where that does not tell them apart."""
    per_split = get_blend_and_blend_per_split(get_args())[1]
    valid = per_split[1] if per_split else None
    paths = valid[0] if valid else []
    short = [os.path.basename(path) for path in paths]
    return short if len(set(short)) == len(short) else paths


def _held_out(datasets: list[Any], names: list[str], consumed_samples: int, to_the_end: bool = False) -> list[HeldOut]:
    """What all ranks evaluate on, as rank 0 (which always reads) sees it; sets without samples are left out."""
    args = get_args()
    datasets = datasets if len(datasets) == len(names) else [None] * len(names)
    if to_the_end:
        datasets = [None if each is None else FilledUp(each, args.global_batch_size) for each in datasets]
    data = [_iterate(each, consumed_samples, again=to_the_end) for each in datasets]
    num_batches = torch.tensor(
        [
            0 if batches is None else len(dataset) // args.global_batch_size if to_the_end else args.eval_iters
            for dataset, batches in zip(datasets, data)
        ],
        device=device.current_device(),
    )
    torch.distributed.broadcast(num_batches, src=0)
    return [HeldOut(batches, n, name) for batches, n, name in zip(data, num_batches.tolist(), names) if n]


def _iterate(dataset: Any, consumed_samples: int, again: bool = False) -> Batches:
    """Every chunk reads the same microbatches, each at its own time; those that need no data never start to."""
    num_chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if num_chunks is None:
        return _microbatches(dataset, consumed_samples, again)
    iterators = [_microbatches(dataset, consumed_samples, again) for _ in range(num_chunks)]
    return None if any(iterator is None for iterator in iterators) else iterators  # type: ignore[return-value]


def _microbatches(dataset: Any, consumed_samples: int, again: bool) -> Iterator[Any] | None:
    """This rank's microbatches; with `again` in order, and from the start at the end."""
    args = get_args()
    if dataset is None or parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    if args.dataloader_type == "external":
        if isinstance(dataset, torch.utils.data.Dataset):
            raise ValueError(
                "--dataloader-type external is for programs whose dataset provider returns loaders, iterables over "
                f"microbatches; this one returns a {type(dataset).__name__}: use single or cyclic"
            )
        return RememberingIterator(iter(dataset))
    if not len(dataset):  # of a split that the run does not use
        return None
    loader = build_pretraining_data_loader(
        dataset,
        consumed_samples,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        dataloader_type="single" if again else args.dataloader_type,
        num_workers=args.num_workers,
        data_sharding=args.data_sharding,
        seed=args.seed,
    )
    if loader is None:
        return None
    return RememberingIterator(_read(loader, forever=again or args.dataloader_type == "cyclic"))


def _read(loader: Any, forever: bool) -> Iterator[Any]:
    """Its batches; processes that load them start with the first."""
    yield from loader
    while forever:
        yield from loader
