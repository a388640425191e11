"""State of the distributed optimizer on its way to and from checkpoints.

Two coordinate systems: `model space`, where a piece is a range of a named parameter and fits every layout,
and buffers, where it is a range of a bucket (`distrib_optim.pt`), which only the layout that wrote it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket, _ParamAndGradBuffer
from megatron.core.optimizer.muon import Muon
from megatron.core.utils import get_pg_rank, get_pg_size

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, ParamShard

DTypes = tuple[torch.dtype, torch.dtype]

# --- model space ---


def shard_in_model_space(
    optimizer: DistributedOptimizer, model_sharded_state_dict: ShardedStateDict
) -> dict[int, dict[str, Any]]:
    """{number of the piece: {`fp32_param`, moments: description}}, named after the model's parameters."""
    params = [shard.param for shard in optimizer.shards]
    sharded_params = get_param_id_to_sharded_param_map(model_sharded_state_dict, params)
    state: dict[int, dict[str, Any]] = {}
    for i, shard in enumerate(optimizer.shards):
        model_shard: ShardedTensor | ShardedTensorFactory = sharded_params[i]
        state[i] = {
            _model_space_name(name): replace(
                model_shard,
                key=f"optimizer.state.{_model_space_name(name)}.{model_shard.key}",
                data=tensor,
                replica_id=_replica_of_piece(optimizer, model_shard),
                flattened_range=slice(shard.start, shard.end),
                **_dtype_field(model_shard, tensor),
            )
            for name, tensor in optimizer.param_state(shard).items()
        }
    return state


def _dtype_field(model_shard: ShardedTensor | ShardedTensorFactory, tensor: Tensor) -> dict[str, Any]:
    """A factory learns the type from the data."""
    return {"dtype": tensor.dtype} if isinstance(model_shard, ShardedTensor) else {}


def _model_space_name(name: str) -> str:
    return "fp32_param" if name == "param" else name


def _replica_of_piece(optimizer: DistributedOptimizer, model_shard: ShardedTensor | ShardedTensorFactory) -> Any:
    """The parameter's, except that data-parallel ranks hold different pieces of it."""
    replica = model_shard.replica_id
    assert isinstance(replica, tuple) and len(replica) == 3, f"replica_id of {model_shard.key} is not (pp, tp, dp)"
    return (*replica[:2], optimizer.distributed_optimizer_instance_id)


def load_from_model_space(optimizer: DistributedOptimizer, state_dict: dict[Any, Any]) -> None:
    """Fill main params and moments with a loaded `shard_in_model_space`."""
    for i, shard in enumerate(optimizer.shards):
        saved = state_dict[i] if i in state_dict else state_dict[str(i)]
        for name in optimizer.param_state(shard):
            _fill(optimizer, shard, name, saved[_model_space_name(name)])
    optimizer.round_main_params_to_model()


# --- buffers ---


def own_ranges(optimizer: DistributedOptimizer) -> dict[int, dict[DTypes, list[dict[str, Tensor]]]]:
    """{buffer: {types: [{name: this rank's range of the bucket}, ...]}}, fp32 and zero between parameters."""
    optimizer.init_state_fn(optimizer.optimizer)
    names = _state_names(optimizer)
    ranges: dict[int, dict[DTypes, list[dict[str, Tensor]]]] = {}
    for b, buffer in enumerate(optimizer.buffers):
        num_shards = get_pg_size(buffer.data_parallel_group)
        ranges[b] = {
            _dtypes(buffer): [
                {
                    name: torch.zeros(bucket.grad_data.numel() // num_shards, device=bucket.grad_data.device)
                    for name in names
                }
                for bucket in buffer.buckets
            ]
        }
    for shard, own in _shards_with(optimizer, ranges):
        for name, tensor in optimizer.param_state(shard).items():
            own[name][shard.offset : shard.offset + tensor.numel()].copy_(tensor)
    return ranges


def load_own_ranges(optimizer: DistributedOptimizer, ranges: dict[Any, Any]) -> None:
    """Fill main params and moments with what `own_ranges` returned."""
    optimizer.init_state_fn(optimizer.optimizer)
    for shard, own in _shards_with(optimizer, ranges):
        for name in optimizer.param_state(shard):
            _fill(optimizer, shard, name, own[name][shard.offset : shard.offset + shard.end - shard.start])
    optimizer.round_main_params_to_model()


def _shards_with(optimizer: DistributedOptimizer, ranges: dict[Any, Any]) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Each piece together with the entry of the bucket that it lies in."""
    buffer_index = {id(buffer): b for b, buffer in enumerate(optimizer.buffers)}
    for shard in optimizer.shards:
        buckets = ranges[buffer_index[id(shard.buffer)]][_dtypes(shard.buffer)]
        yield shard, buckets[shard.buffer.buckets.index(shard.bucket)]


def _state_names(optimizer: DistributedOptimizer) -> list[str]:
    """The same on all ranks, also on one that owns nothing but padding."""
    is_adam = "betas" in optimizer.param_groups[0]
    has_momentum = optimizer.param_groups[0].get("momentum", 0.0) != 0.0 or isinstance(optimizer.optimizer, Muon)
    return ["param", *(["exp_avg", "exp_avg_sq"] if is_adam else []), *(["momentum_buffer"] if has_momentum else [])]


def _dtypes(buffer: _ParamAndGradBuffer) -> DTypes:
    return buffer.param_dtype, buffer.grad_dtype


def gather_buffers(optimizer: DistributedOptimizer) -> dict[Any, Any] | None:
    """Whole buffers on the first data-parallel rank, without padding at the ends of buckets; else None."""
    is_first = get_pg_rank(optimizer.data_parallel_group) == 0
    state: dict[Any, Any] = {"buckets_coalesced": True}
    ranges = own_ranges(optimizer)
    for b, buffer in enumerate(optimizer.buffers):
        entry: dict[str, Any] = {}
        for name in _state_names(optimizer):
            buckets = []
            for bucket, own in zip(buffer.buckets, ranges[b][_dtypes(buffer)]):
                whole = _gather_to_first(optimizer, own[name])
                if whole is not None:
                    buckets.append(whole[: bucket.layout.numel_unpadded])
            if is_first:
                entry[name] = torch.cat(buckets)
        state[b] = {_dtypes(buffer): {**entry, "numel_unpadded": buffer.numel_unpadded}}
    return state if is_first else None


def scatter_buffers(optimizer: DistributedOptimizer, state_dict: dict[Any, Any] | None) -> None:
    """Restore `gather_buffers` from the first data-parallel rank."""

    def bucket_of(buffer_index: int, name: str, bucket: _ParamAndGradBucket) -> Tensor:
        assert state_dict is not None
        buffer = optimizer.buffers[buffer_index]
        entry = state_dict[buffer_index][_dtypes(buffer)]
        start = sum(other.layout.numel_unpadded for other in buffer.buckets[: buffer.buckets.index(bucket)])
        return entry[name][start : start + bucket.layout.numel_unpadded]

    def check() -> None:
        if state_dict is None:
            raise ValueError("the checkpoint has no state of the distributed optimizer")
        for b, buffer in enumerate(optimizer.buffers):
            saved = {dtypes: entry["numel_unpadded"] for dtypes, entry in state_dict.get(b, {}).items()}
            if saved != {_dtypes(buffer): buffer.numel_unpadded}:
                raise ValueError(
                    f"buffer {b} has {buffer.numel_unpadded} elements of types {_dtypes(buffer)}, in the "
                    f"checkpoint it has {saved}; this form only loads into the layout that wrote it"
                )

    _agree_on_first(optimizer, check)
    _scatter_all(optimizer, bucket_of)


def scatter_legacy_buffers(optimizer: DistributedOptimizer, state_dict: dict[Any, Any] | None) -> None:
    """Restore the old form {buffer: {torch.float32: {name: [bucket, ...]}}} from the first rank."""

    def bucket_of(buffer_index: int, name: str, bucket: _ParamAndGradBucket) -> Tensor:
        assert state_dict is not None
        saved = state_dict[buffer_index][torch.float32][name]
        return saved[optimizer.buffers[buffer_index].buckets.index(bucket)][: bucket.layout.numel_unpadded]

    def check() -> None:
        if state_dict is None:
            raise ValueError("the checkpoint has no state of the distributed optimizer")
        for b, buffer in enumerate(optimizer.buffers):
            saved = [tensor.numel() for tensor in state_dict[b][torch.float32]["param"]]
            wanted = [bucket.layout.numel_unpadded for bucket in buffer.buckets]
            if len(saved) != len(wanted) or any(have < want for have, want in zip(saved, wanted)):
                raise ValueError(f"buckets of buffer {b} have {wanted} elements, those of the checkpoint {saved}")

    _agree_on_first(optimizer, check)
    _scatter_all(optimizer, bucket_of)


def _scatter_all(optimizer: DistributedOptimizer, bucket_of: Any) -> None:
    is_first = get_pg_rank(optimizer.data_parallel_group) == 0
    ranges = own_ranges(optimizer)
    for b, buffer in enumerate(optimizer.buffers):
        for bucket, own in zip(buffer.buckets, ranges[b][_dtypes(buffer)]):
            for name in _state_names(optimizer):
                whole = None
                if is_first:
                    whole = torch.zeros(bucket.grad_data.numel())
                    whole[: bucket.layout.numel_unpadded] = bucket_of(b, name, bucket)
                _scatter_from_first(optimizer, whole, own[name])
    load_own_ranges(optimizer, ranges)


def read_on_first_rank(optimizer: DistributedOptimizer, filename: str | Path) -> dict[Any, Any] | None:
    """The file's content on the first data-parallel rank, None on the others; a failure is raised on all."""
    content: dict[Any, Any] | None = None

    def read() -> None:
        nonlocal content
        content = safe_torch_load(filename)

    _agree_on_first(optimizer, read)
    return content


def shard_as_object(optimizer: DistributedOptimizer, is_loading: bool) -> ShardedObject | LocalNonpersistentObject:
    """`gather_buffers` as an object of the first data-parallel rank; the others neither write nor read."""
    state = None if is_loading else gather_buffers(optimizer)
    if get_pg_rank(optimizer.data_parallel_group) == 0:
        replica = optimizer.distributed_optimizer_instance_id
        return ShardedObject(optimizer.checkpoint_key("param_state"), state, (1,), (0,), replica_id=replica)
    return LocalNonpersistentObject(None)


def shard_in_bucket_space(optimizer: DistributedOptimizer) -> dict[Any, Any]:
    """`own_ranges` as shards of the padded buckets."""
    group = optimizer.data_parallel_group
    place = (0, get_pg_rank(group), get_pg_size(group))
    replica = optimizer.distributed_optimizer_instance_id
    sharded: dict[Any, Any] = {}
    for b, by_types in own_ranges(optimizer).items():
        for dtypes, buckets in by_types.items():
            prefix = optimizer.checkpoint_key(f"gbuf_idx_{b}.dtype_{dtypes}")
            sharded.setdefault(b, {})[dtypes] = [
                {
                    name: ShardedTensor.from_rank_offsets(
                        f"{prefix}.bucket_idx_{j}.{name}", tensor, place, replica_id=replica
                    )
                    for name, tensor in own.items()
                }
                for j, own in enumerate(buckets)
            ]
    return sharded


# --- between the ranks of a data-parallel group ---


def _host_group(optimizer: DistributedOptimizer) -> tuple[ProcessGroup | None, torch.device]:
    """The group that moves host memory if there is one, and where its tensors must lie."""
    if optimizer.data_parallel_group_gloo is not None:
        return optimizer.data_parallel_group_gloo, torch.device("cpu")
    return optimizer.data_parallel_group, device.current_device()


def _gather_to_first(optimizer: DistributedOptimizer, own: Tensor) -> Tensor | None:
    """Concatenation of `own` over ranks in host memory; None except on the first."""
    group, where = _host_group(optimizer)
    own = own.to(where)
    if get_pg_size(group) == 1:
        return own.cpu()
    assert group is not None
    pieces = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(own, pieces, dst=dist.get_global_rank(group, 0), group=group)
    return torch.cat(pieces).cpu() if pieces is not None else None


def _scatter_from_first(optimizer: DistributedOptimizer, whole: Tensor | None, own: Tensor) -> None:
    """Fill `own` with this rank's part of the first rank's `whole`."""
    group, where = _host_group(optimizer)
    if get_pg_size(group) == 1:
        assert whole is not None
        own.copy_(whole)
        return
    assert group is not None
    received = torch.empty(own.shape, dtype=own.dtype, device=where)
    pieces = None if whole is None else list(whole.to(where).chunk(group.size()))
    dist.scatter(received, pieces, src=dist.get_global_rank(group, 0), group=group)
    own.copy_(received)


def _agree_on_first(optimizer: DistributedOptimizer, action: Any) -> None:
    """Run `action` on the first data-parallel rank; its exception is raised on all, so that none waits."""
    group, _ = _host_group(optimizer)
    failure: list[str | None] = [None]
    error: Exception | None = None
    if get_pg_rank(group) == 0:
        try:
            action()
        except Exception as exception:  # whatever it is, the others have to hear of it
            error, failure = exception, [f"{type(exception).__name__}: {exception}"]
    if get_pg_size(group) > 1:
        assert group is not None
        dist.broadcast_object_list(failure, src=dist.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise RuntimeError(f"the first data-parallel rank failed: {failure[0]}")


def _fill(optimizer: DistributedOptimizer, shard: ParamShard, name: str, values: Tensor) -> None:
    if values.shape != shard.main.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)} in the checkpoint, {tuple(shard.main.shape)} here")
    optimizer.fill_param_state(shard, name, values)
