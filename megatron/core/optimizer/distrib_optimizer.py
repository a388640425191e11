"""The optimizer whose state is split over data-parallel ranks (ZeRO stage 1, arXiv:1910.02054, section 5.1).

Every bucket of the gradient buffers is cut into as many equal ranges as there are data-parallel ranks,
irrespective of where parameters begin and end. A rank updates its range and the weights are then gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.collectives import start_all_gather
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket, _ParamAndGradBuffer
from megatron.core.fp8.weights import Piece, cast_weights
from megatron.core.optimizer import distrib_optimizer_checkpoint as checkpoint
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.megatron_optimizer import InitStateFn
from megatron.core.optimizer.mixed_precision_optimizer import MixedPrecisionOptimizer, copy_all
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import match_saved_groups
from megatron.core.optimizer.state import common_step, restore_scaler
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.utils import get_pg_rank, get_pg_size

SHARDING_TYPES = ("fully_sharded_model_space", "dp_zero_gather_scatter", "fully_sharded_bucket_space")


@dataclass(eq=False)
class ParamShard:
    """The piece of a parameter that this rank updates: elements `[start, end)` of the flattened parameter."""

    param: Parameter
    start: int
    end: int
    buffer: _ParamAndGradBuffer
    bucket: _ParamAndGradBucket
    offset: int
    """Where the piece starts within this rank's range of the bucket."""
    main: Tensor
    """[end - start]: what the update rule calls its parameter. fp32, view of the weights if they are fp32, else of
    this rank's main copy; of the precision-aware form always a view of the weights."""

    @property
    def model_piece(self) -> Tensor:
        """View of the elements in the model's parameter."""
        return self.param.data.view(-1)[self.start : self.end]

    @property
    def fp8_piece(self) -> Piece:
        """For the cast of weights that are kept in fp8."""
        place = self.buffer.param_spans[self.param][0]
        assert self.buffer.bytes_of_weights is not None
        stored = self.buffer.bytes_of_weights[place + self.start : place + self.end].view(torch.float8_e4m3fn)
        return Piece(self.param, self.start, self.end, self.main.to(self.buffer.param_dtype), stored)

    @property
    def grad_piece(self) -> Tensor:
        """View of their gradient, in the buffer's type."""
        return self.param.main_grad.view(-1)[self.start : self.end]  # type: ignore[attr-defined]


def owned_span(param_span: tuple[int, int], owned: tuple[int, int]) -> tuple[int, int] | None:
    """Elements of the flattened parameter at `param_span` of a buffer that fall into its range `owned`.

    >>> owned_span((10, 30), (0, 16)), owned_span((10, 30), (32, 48))
    ((0, 6), None)
    """
    start, end = max(param_span[0], owned[0]), min(param_span[1], owned[1])
    return (start - param_span[0], end - param_span[0]) if start < end else None


def own_shards(buffer: _ParamAndGradBuffer, *, widen: bool = True) -> list[ParamShard]:
    """The pieces of a buffer that this rank updates; with `widen`, 16-bit weights get an fp32 copy of them."""
    group = buffer.data_parallel_group
    rank, num_shards = get_pg_rank(group), get_pg_size(group)
    shards = []
    for bucket in buffer.buckets:
        owned = bucket.layout.shard(rank, num_shards)
        assert bucket.param_data is not None, "the distributed optimizer needs weights in a buffer"
        weights = bucket.shard(bucket.param_data, group)
        main_range = weights.float() if widen else weights  # the weights themselves where they are fp32
        for param in bucket.params:
            param_span = buffer.param_spans[param]
            span = owned_span(param_span, owned)
            if span is not None:
                offset = param_span[0] + span[0] - owned[0]
                main = main_range[offset : offset + span[1] - span[0]]
                shards.append(ParamShard(param, *span, buffer, bucket, offset, main))
    return shards


class DistributedOptimizer(MixedPrecisionOptimizer):
    """Main params are this rank's flattened pieces of the model's parameters, fp32 or 16-bit.

    Args:
        optimizer: over the model's parameters; its groups are changed to hold the pieces.
        config: clipping and statistics; timers.
        grad_scaler: for fp16.
        init_state_fn: allocates moments.
        model_chunks: `DistributedDataParallel` chunks; gather their weights after a step.
        per_model_buffers: chunk index -> buffers that hold the parameters of `optimizer`.
        data_parallel_group: ranks over which the buffers are cut.
        data_parallel_group_gloo: the same ranks over gloo, to collect checkpoints in host memory.
        data_parallel_group_idx: which of the cut replicas this is (rank in the model-parallel group).
        distributed_optimizer_instance_id: which copy of the sharded state this is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: InitStateFn | None,
        model_chunks: Sequence[Any],
        per_model_buffers: Mapping[int, Sequence[_ParamAndGradBuffer]],
        data_parallel_group: ProcessGroup | None,
        data_parallel_group_gloo: ProcessGroup | None,
        data_parallel_group_idx: int,
        distributed_optimizer_instance_id: int,
    ) -> None:
        super().__init__(optimizer, config, grad_scaler, init_state_fn or (lambda optimizer: None))
        for chunk in model_chunks:
            if not chunk.ddp_config.use_distributed_optimizer:
                raise ValueError(
                    "use_distributed_optimizer is set in OptimizerConfig but not in the model's "
                    "DistributedDataParallelConfig; set both"
                )
        self.model_chunks = list(model_chunks)
        self.buffers = [buffer for index in sorted(per_model_buffers) for buffer in per_model_buffers[index]]
        self.data_parallel_group = data_parallel_group
        self.data_parallel_group_gloo = data_parallel_group_gloo
        self.data_parallel_group_idx = data_parallel_group_idx
        self.distributed_optimizer_instance_id = distributed_optimizer_instance_id
        if has_default_process_groups():
            self.grad_stats_parallel_group = default_process_groups().intra_dist_opt
        self.shards = [shard for buffer in self.buffers for shard in self._cut(buffer)]
        self._start_of = {shard.main: shard.start for shard in self.shards}
        self._put_shards_into_groups()
        self._keep_weights_in_fp8()

    def _cut(self, buffer: _ParamAndGradBuffer) -> list[ParamShard]:
        return own_shards(buffer)

    def first_element(self, main: Tensor) -> int:
        return self._start_of[main]

    def _put_shards_into_groups(self) -> None:
        shard_of = {shard.param: shard for shard in self.shards}
        for i, group in enumerate(self.optimizer.param_groups):
            owned = [shard_of[param] for param in self.model_params[i] if param in shard_of]
            self.model_params[i] = [shard.param for shard in owned]
            group["params"] = [shard.main for shard in owned]
            for shard in owned:
                shard.param.main_param = shard.main  # type: ignore[attr-defined]
                shard.param.main_param_sharded = True  # type: ignore[attr-defined]

    # --- the step ---

    def _copy_model_grads_to_main_grads(self) -> None:
        for shard in self.shards:
            shard.main.grad = shard.grad_piece.float()  # a view when gradients are accumulated in fp32

    def _release_main_grads(self) -> None:
        """Main params are never the model's own objects; their gradients cannot reach the next backward."""

    def whole_of_parts(
        self, params: Collection[Parameter], parts: dict[Tensor, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(main param, flattened shard of its parameter) of each main param of `parts`, bucket by bucket.

        Communicates: all-gathers of the buckets that hold any of `params`, which all ranks name alike.

        Args:
            parts: main param -> what this rank has for its elements, fp32 [end - start].
        """
        for buffer in self.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                if not any(param in params for param in bucket.params):
                    continue
                own = torch.zeros(bucket.grad_data.numel() // get_pg_size(group), device=bucket.grad_data.device)
                shards = [shard for shard in self.shards if shard.bucket is bucket and shard.main in parts]
                for shard in shards:
                    own[shard.offset : shard.offset + shard.end - shard.start] = parts[shard.main]
                whole = start_all_gather(own, group, what="momentum of a bucket").wait()
                for shard in shards:
                    start, end = (place - bucket.layout.start for place in buffer.param_spans[shard.param])
                    yield shard.main, whole[start:end]

    def _rounded_weights(self) -> list[tuple[Tensor, Tensor]]:
        shards = [s for s in self.shards if s.param.dtype != torch.float32 and s.buffer.bytes_of_weights is None]
        return [(shard.model_piece, shard.main) for shard in shards]

    def _finish_weights(self) -> None:
        self._cast_to_fp8()

    def _copy_model_params_to_main_params(self) -> None:
        """Weights that are kept in fp8 are followed where they have been widened, and then cast on all ranks."""
        super()._copy_model_params_to_main_params()
        shards = [shard for shard in self._shards_in_fp8() if shard.buffer.is_wide]
        copy_all([shard.main for shard in shards], [shard.model_piece for shard in shards])
        if any(buffer.in_fp8 for buffer in self.buffers):
            self.round_main_params_to_model()

    # --- weights in fp8 ---

    def _keep_weights_in_fp8(self) -> None:
        """Once main params hold what the weights were, these may lose it."""
        buffers = [buffer for buffer in self.buffers if buffer.in_fp8]
        for buffer in buffers:
            buffer.keep_in_fp8(partial(self._write_own_weights, buffer))
        if buffers:
            self.round_main_params_to_model()

    def _shards_in_fp8(self) -> list[ParamShard]:
        return [shard for shard in self.shards if shard.buffer.bytes_of_weights is not None]

    def _cast_to_fp8(self) -> None:
        """Fill this rank's parts of the bytes; the weights are these from now on."""
        shards = self._shards_in_fp8()
        for buffer in self.buffers:
            if buffer.in_fp8:
                pieces = [shard.fp8_piece for shard in shards if shard.buffer is buffer]
                cast_weights(buffer.params, pieces, buffer.data_parallel_group)
                buffer.narrow_weights()

    def _write_own_weights(self, buffer: _ParamAndGradBuffer, wide: Tensor) -> None:
        """Fill this rank's parts of `wide`, a tensor like the buffer, with what the bytes are cast from."""
        shards = [shard for shard in self.shards if shard.buffer is buffer]
        places = [buffer.param_spans[shard.param][0] for shard in shards]
        parts = [wide[place + shard.start : place + shard.end] for place, shard in zip(places, shards)]
        copy_all(parts, [shard.main for shard in shards])

    def update_weights(self) -> None:
        """Update the owned pieces, once gathered weights have arrived around them."""
        for chunk in self.model_chunks:
            chunk.settle_param_sync()
        super().update_weights()

    @property
    def sharded_chunks(self) -> Sequence[Any]:
        return self.model_chunks

    # --- checkpoints: groups and loss scale ---

    def state_dict(self) -> dict[str, Any]:
        """Groups (with the step counter, without parameters) and loss scale.

        The moments and main params are in `save_parameter_state`.
        """
        step = common_step(self.optimizer.state)
        groups = []
        for group in self.optimizer.param_groups:
            entry = {name: value for name, value in group.items() if name != "params"}
            groups.append(entry if step is None else {**entry, "step": step})
        state_dict: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler is not None:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, and the parameter state too if it is a loaded `sharded_state_dict`."""
        self.init_state_fn(self.optimizer)
        matches = match_saved_groups(self.optimizer.param_groups, state_dict["optimizer"]["param_groups"])
        for group, (loaded, _) in zip(self.optimizer.param_groups, matches):
            step = loaded.pop("step", None)
            group.update(loaded)
            for main in group["params"]:
                if step is not None and "step" in self.optimizer.state[main]:
                    self.optimizer.state[main]["step"].fill_(float(step))
        restore_scaler(self.grad_scaler, state_dict)
        if "param_state" in state_dict:
            sharding_type = state_dict["param_state_sharding_type"]
            require_known_sharding_type(sharding_type)
            load = {
                "fully_sharded_model_space": self.load_parameter_state_from_fs_model_space,
                "dp_zero_gather_scatter": self.load_parameter_state_from_dp_zero,
                "fully_sharded_bucket_space": self.load_parameter_state_from_fs_bucket_space,
            }[sharding_type]
            load(state_dict["param_state"])

    def split_state_dict_if_needed(self, state_dict: dict[str, Any]) -> None:
        """Nothing: parameter state is indexed by buffer, and buffers hold one type each from the start."""

    def sharded_state_dict(  # type: ignore[override]
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Groups, loss scale, and the parameter state in one of three forms.

        `fully_sharded_model_space` (default) loads into any layout; the other two describe buffers and need
        the same tensor and pipeline sizes.
        """
        sharding_type = sharding_type or (metadata or {}).get("distrib_optim_sharding_type") or SHARDING_TYPES[0]
        require_known_sharding_type(sharding_type)
        self.init_state_fn(self.optimizer)
        state_dict: dict[str, Any] = self.state_dict()
        if sharding_type != "fully_sharded_model_space":
            replica = (self.distributed_optimizer_instance_id, get_pg_rank(self.data_parallel_group))
            state_dict = {
                name: ShardedObject(self.checkpoint_key(name), value, (1,), (0,), replica_id=replica)
                for name, value in state_dict.items()
            }
        describe = {
            "fully_sharded_model_space": self.sharded_param_state_fs_model_space,
            "dp_zero_gather_scatter": self.sharded_param_state_dp_zero,
            "fully_sharded_bucket_space": self.sharded_param_state_fs_bucket_space,
        }[sharding_type]
        state_dict["param_state"] = describe(model_sharded_state_dict, is_loading)
        state_dict["param_state_sharding_type"] = sharding_type
        return state_dict

    def checkpoint_key(self, name: str) -> str:
        """Name of something that belongs to this replica's buffers."""
        return f"optimizer.distributed.dp_group_idx_{self.data_parallel_group_idx}.{name}"

    # --- checkpoints: main params and moments ---

    def param_state(self, shard: ParamShard) -> dict[str, Tensor]:
        """`param` and moments of a piece, each fp32 [end - start], to be read."""
        moments = {name: value for name, value in self.optimizer.state[shard.main].items() if name != "step"}
        return {"param": shard.main, **moments}

    def fill_param_state(self, shard: ParamShard, name: str, values: Tensor) -> None:
        """Set one of the tensors that `param_state` returns; `round_main_params_to_model` comes after the last."""
        with torch.no_grad():
            self.param_state(shard)[name].copy_(values)

    def round_main_params_to_model(self) -> None:
        """After main params were loaded: the model's weights follow, on all ranks."""
        for chunk in self.model_chunks:
            chunk.settle_param_sync()
        self._copy_main_params_to_model_params()
        for chunk in self.model_chunks:
            chunk.start_param_sync(force_sync=True)

    def sharded_param_state_fs_model_space(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> dict[int, Any]:
        """Pieces as ranges of the model's parameters, `optimizer.state.<what>.<parameter>`."""
        return checkpoint.shard_in_model_space(self, model_sharded_state_dict)

    def load_parameter_state_from_fs_model_space(self, state_dict: dict[Any, Any]) -> None:
        """Restore a loaded `sharded_param_state_fs_model_space`."""
        checkpoint.load_from_model_space(self, state_dict)

    def sharded_param_state_dp_zero(self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False) -> Any:
        """`get_parameter_state_dp_zero` as one object of the first data-parallel rank."""
        return checkpoint.shard_as_object(self, is_loading)

    def get_parameter_state_dp_zero(self) -> dict[Any, Any] | None:
        """The content of `distrib_optim.pt`, gathered to the first rank of the first instance; None on the others."""
        state = checkpoint.gather_buffers(self)
        return state if self.distributed_optimizer_instance_id == 0 else None

    def load_parameter_state_from_dp_zero(
        self, state_dict: dict[Any, Any] | None, *, update_legacy_format: bool = False
    ) -> None:
        """Restore `get_parameter_state_dp_zero`; only the first data-parallel rank's `state_dict` is read."""
        if update_legacy_format:
            self.load_parameter_state_from_dp_zero_legacy(state_dict)
        else:
            checkpoint.scatter_buffers(self, state_dict)

    def load_parameter_state_from_dp_zero_legacy(self, state_dict: dict[Any, Any] | None) -> None:
        """Restore the form that was written before February 2024, a list of buckets under the key fp32."""
        checkpoint.scatter_legacy_buffers(self, state_dict)

    def sharded_param_state_fs_bucket_space(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False
    ) -> dict[Any, Any]:
        """Every rank's range of every bucket as a shard of the bucket."""
        return checkpoint.shard_in_bucket_space(self)

    def get_parameter_state_fs_bucket_space(self) -> dict[Any, Any]:
        """This rank's ranges of all buckets, fp32."""
        return checkpoint.own_ranges(self)

    def load_parameter_state_from_fs_bucket_space(self, state_dict: dict[Any, Any]) -> None:
        """Restore `get_parameter_state_fs_bucket_space`."""
        checkpoint.load_own_ranges(self, state_dict)

    def save_parameter_state(self, filename: str | Path) -> None:
        """Write `distrib_optim.pt`; collective, the first data-parallel rank writes."""
        state_dict = self.get_parameter_state_dp_zero()
        if state_dict is not None:
            torch.save(state_dict, filename)

    def load_parameter_state(self, filename: str | Path, *, update_legacy_format: bool = False) -> None:
        """Restore what `save_parameter_state` wrote; collective, the first data-parallel rank reads."""
        state_dict = checkpoint.read_on_first_rank(self, filename)
        self.load_parameter_state_from_dp_zero(state_dict, update_legacy_format=update_legacy_format)


def require_known_sharding_type(sharding_type: str) -> None:
    """Refuse names that this version neither writes nor reads."""
    if sharding_type not in SHARDING_TYPES:
        raise ValueError(f"distrib_optim_sharding_type ({sharding_type}) must be one of {', '.join(SHARDING_TYPES)}")


__all__ = ["DistributedOptimizer", "ParamShard", "owned_span", "own_shards"]
