"""Printing on one rank, batches on a tensor parallel rank, and other small things that programs share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import device, parallel_state
from megatron.core.collectives import all_reduce, broadcast
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.distributed import DistributedDataParallel, TorchFullyShardedDataParallel
from megatron.core.tensor_parallel.data import broadcast_data
from megatron.core.utils import get_batch_on_this_cp_rank, get_pg_rank, get_pg_size, unwrap_model
from megatron.core.vocabulary_padding import without_padding
from megatron.training.global_vars import get_args, get_timers, get_tokenizer

__all__ = ["get_batch_on_this_cp_rank", "unwrap_model"]

Blend = tuple[list[str], list[float] | None]


def rank() -> int:
    """Global rank, 0 before torch.distributed runs."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_last_rank() -> bool:
    """Whether this is the rank that logs: the last of those that have the loss."""
    if not parallel_state.model_parallel_is_initialized():
        return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    groups = parallel_state.get_process_groups()
    is_last_replica = all(get_pg_rank(g) == get_pg_size(g) - 1 for g in (groups.tp, groups.cp, groups.dp))
    return is_last_replica and parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def print_rank_0(message: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(message, flush=True)


def print_rank_last(message: str) -> None:
    """Print on the last rank."""
    if is_last_rank():
        print(message, flush=True)


def warn_rank_0(message: str) -> None:
    """Print a warning on rank 0, to stderr."""
    if rank() == 0:
        print(f"WARNING: {message}", file=sys.stderr, flush=True)


def average_losses_across_data_parallel_group(losses: list[Tensor]) -> Tensor:
    """Mean of each loss over the data parallel group; [len(losses)]. Communicates: all-reduce."""
    averaged = torch.stack([loss.detach().reshape(()) for loss in losses])
    group = parallel_state.get_data_parallel_group()
    all_reduce(averaged, group=group, what="losses")
    return averaged / group.size()


def batch_keys(first_stage: bool, last_stage: bool, document_mask: bool, embeds_last: bool = False) -> list[str]:
    """What a pipeline stage needs of a batch; every stage needs the tokens if they tell where documents end, the last
    one if it predicts further tokens (`embeds_last`)."""
    keys = (
        ["tokens", "position_ids"]
        if first_stage or (last_stage and embeds_last)
        else ["tokens"]
        if document_mask
        else []
    )
    return keys + (["labels", "loss_mask"] if last_stage else [])


def get_batch_on_this_tp_rank(data_iterator: Iterator[dict[str, Tensor]] | None) -> dict[str, Tensor | None]:
    """One microbatch, read on the first rank of the tensor parallel group and broadcast to the others.

    Tensors are [b, s]: `tokens`, `labels`, `position_ids` int64, `loss_mask` fp32; `attention_mask` bool [b,
    1, s, s] if the data set makes one. What this pipeline stage does not need is None.
    """
    args = get_args()
    keys = batch_keys(
        parallel_state.is_pipeline_first_stage(ignore_virtual=False),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False),
        args.reset_attention_mask,
        bool(args.mtp_num_layers),
    )
    shape = (args.micro_batch_size, args.seq_length)
    batch: dict[str, Tensor | None] = dict.fromkeys(["tokens", "labels", "loss_mask", "position_ids", "attention_mask"])
    with_mask = dense_attention_mask(args)
    if with_mask:
        keys = [*keys, "attention_mask"]
    if not keys:
        return batch
    group = parallel_state.get_tensor_model_parallel_group()
    read: dict[str, Tensor] = next(data_iterator) if get_pg_rank(group) == 0 else {}  # type: ignore[arg-type]
    for key in keys:
        dtype = {"loss_mask": torch.float32, "attention_mask": torch.bool}.get(key, torch.int64)
        dims = (shape[0], 1, shape[1], shape[1]) if key == "attention_mask" else shape
        batch[key] = _broadcast(read.get(key), dims, dtype, group)
    return batch


def _broadcast(read: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, group: Any) -> Tensor:
    if read is not None:
        if tuple(read.shape) != shape:
            raise ValueError(f"the data set gives batches of shape {tuple(read.shape)}; the flags ask for {shape}")
        values = read.to(device.current_device(), dtype=dtype, non_blocking=True).contiguous()
    else:
        values = torch.empty(shape, dtype=dtype, device=device.current_device())
    if get_pg_size(group) > 1:
        broadcast(values, group_src=0, group=group, what="batches")
    return values


def dense_attention_mask(args: Any) -> bool:
    """Whether batches carry an s×s mask: only for isolated documents on the unfused attention path, which needs it."""
    backend = getattr(args.attention_backend, "name", str(args.attention_backend))
    return bool(
        args.reset_attention_mask and args.create_attention_mask_in_dataloader and backend in ("unfused", "local")
    )


def get_ltor_masks_and_position_ids(
    data: Tensor, eod_token: int, reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks and positions of left-to-right tokens [b, s].

    Returns:
        attention_mask: bool [b or 1, 1, s, s], True where attention is forbidden.
        loss_mask: fp32 [b, s], 0 on end-of-document tokens with `eod_mask_loss`.
        position_ids: int64 [b, s], counted from 0 after each end of document with `reset_position_ids`.
    """
    length = data.size(1)
    is_eod = data == eod_token
    documents = torch.cumsum(is_eod.int(), 1) - is_eod.int()  # number of the document each token belongs to
    allowed = torch.ones(length, length, dtype=torch.bool, device=data.device).tril()[None, None]
    if reset_attention_mask:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    loss_mask = torch.ones(data.shape, dtype=torch.float32, device=data.device)
    if eod_mask_loss:
        loss_mask[is_eod] = 0.0
    position_ids = torch.arange(length, device=data.device).expand_as(data)
    if reset_position_ids:
        begins = torch.where(torch.roll(is_eod, 1, 1), position_ids, 0)
        begins[:, 0] = 0
        position_ids = position_ids - begins.cummax(1).values
    return ~allowed, loss_mask, position_ids.clone()


def get_timed_batch(data_iterator: Iterator[Any] | None, keys: Sequence[str]) -> dict[str, Tensor]:
    """One microbatch of integers, whole on every pipeline stage, timed as `batch-generator`. Communicates: a broadcast
    from the first tensor parallel rank."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    data = next(data_iterator) if data_iterator is not None else None
    batch = broadcast_data(keys, data, torch.int64)
    timers("batch-generator").stop()
    return batch


def every_stage_reads() -> bool:
    """Whether this rank needs data, where every stage looks at lengths and padding."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def masking_settings(args: Any) -> dict[str, Any]:
    """`dataset_settings`, and what the configurations of data sets with hidden words have in common."""
    return dataset_settings(args) | {
        "masking_probability": args.mask_prob,
        "short_sequence_probability": args.short_seq_prob,
        "masking_do_full_word": True,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
    }


def get_blend_and_blend_per_split(args: Any) -> tuple[Blend | None, list[Blend | None] | None]:
    """(blend shared by all splits, blends by split) of the data flags; at most one of them is not None."""
    if args.data_path is not None or args.data_args_path is not None:
        return get_blend_from_list(args.data_path or _words(args.data_args_path)), None
    if args.per_split_data_args_path is not None:
        with open(args.per_split_data_args_path) as file:
            lists = json.load(file)
        names = ("train", "valid", "test")
        if unknown := sorted(set(lists) - set(names)):
            raise ValueError(f"{args.per_split_data_args_path} names {unknown}; the splits are {', '.join(names)}")
        splits = [lists.get(name) for name in names]
        splits = [words.split() if isinstance(words, str) else words for words in splits]
    else:
        splits = [args.train_data_path, args.valid_data_path, args.test_data_path]
    if all(words is None for words in splits):
        return None, None
    return None, [get_blend_from_list(words) for words in splits]


def dataset_settings(args: Any) -> dict[str, Any]:
    """What the configurations of all kinds of data sets have in common."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return {
        "random_seed": args.seed,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
    }


def _words(path: str) -> list[str]:
    with open(path) as file:
        return file.read().split()


@torch.no_grad()
def calc_params_l2_norm(model: list[nn.Module] | nn.Module, force_create_fp32_copy: bool = False) -> float:
    """L2 norm of all parameters of the whole model, in fp32, each counted once, rows that pad the vocabulary never.

    Communicates: all-reduces.
    """
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    # Of weights that all ranks of a model share, and of experts, which other ranks have others of.
    totals = torch.zeros(2, dtype=torch.float64, device=device.current_device())
    chunks = model if isinstance(model, list) else [model]
    gather_weights(chunks)
    for chunk in chunks:
        for param, piece, start in _own_pieces(chunk):
            if param_is_not_tensor_parallel_duplicate(param) and not _is_shared_copy(param):
                is_expert = int(not getattr(param, "allreduce", True))
                totals[is_expert] += without_padding(param, piece, start).float().square().sum(dtype=torch.float64)
    end_reading_of_weights(chunks)
    all_reduce(totals[0], group=parallel_state.get_model_parallel_group())
    all_reduce(totals[1], group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    total = totals.sum()
    if isinstance(chunks[0], TorchFullyShardedDataParallel):
        all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(total.sqrt())


def _own_pieces(chunk: nn.Module) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(parameter, what this rank has of it, where that begins in the flattened parameter)."""
    if isinstance(chunk, TorchFullyShardedDataParallel):
        chunk.reshard()
        yield from ((one.param, one.local, one.first_element) for one in chunk.rows)
    else:
        yield from ((param, param, 0) for param in chunk.parameters())


def gather_weights(model: list[nn.Module], *, widen: bool = True) -> None:
    """Wait for weights that are still on their way from the ranks that updated them (`--overlap-param-gather`).

    All ranks call it before any of them reads or writes weights outside of forward.

    Args:
        widen: those that are kept in fp8 (`--fp8-param-gather`) become what they were cast from.
    """
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel):
            chunk.finish_param_sync(widen=widen)


def end_reading_of_weights(model: list[nn.Module]) -> None:
    """Free what `gather_weights` made of weights that are kept in fp8 (`--fp8-param-gather`); after reading only."""
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel):
            chunk.narrow_weights()


def _is_shared_copy(param: Tensor) -> bool:
    return getattr(param, "shared", False)
