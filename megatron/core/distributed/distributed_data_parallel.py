"""Data parallelism on flat gradient buffers: replicas see other samples and step with the mean gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.collectives import broadcast
from megatron.core.distributed.bucket_group import partition_buckets
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.overlap import GradReducer, WeightGatherer, in_forward_order
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.fp8.weights import is_kept_in_fp8
from megatron.core.process_groups_config import (
    ProcessGroupCollection,
)
from megatron.core.utils import get_pg_rank, get_pg_size, groups_of

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class DistributedDataParallel(_BaseDataParallel):
    """`module`, with gradients that accumulate in `param.main_grad` and are then averaged over replicas.

    Gradients are averaged over data × context parallel ranks (`config.calculate_per_token_loss`: summed,
    because the caller divides by the number of tokens). `param.grad` is freed as soon as it has been added to
    `main_grad`; whoever adds to `main_grad` directly says so by `param.grad_added_to_main_grad = True`.
    Parameters whose attribute `allreduce` is False are experts, with replicas in the expert data-parallel
    group.

    The order of a step: `zero_grad_buffer`, microbatches (all but the last in `no_sync`), `finish_grad_sync`. With
    `overlap_grad_reduce` buckets are reduced while the last backward runs. With `overlap_param_gather` the optimizer
    leaves weights that other ranks have updated on their way: the forward of each submodule waits for those it
    needs, and so do this class's `state_dict` and its like. Who reads weights elsewhere calls `finish_param_sync`.

    Args:
        config: the model's.
        ddp_config: the form of the buffers and their reduction.
        module: the model chunk; its parameters' data moves into flat buffers with the distributed optimizer.
        disable_bucketing: one bucket whatever `bucket_size` says, for chunks whose reduction cannot overlap
            anyway.
        grad_comm_pgs: groups to reduce over (`dp_cp`, `intra_dp_cp`, `expt_dp`, `intra_expt_dp`,
            `inter_dist_opt`); default `parallel_state`.
        model_comm_pgs: groups the model is cut over (`pp`); default `parallel_state`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
        grad_comm_pgs: ProcessGroupCollection | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config, module)
        if config.calculate_per_token_loss and ddp_config.average_in_collective:
            raise ValueError("average_in_collective must be False with calculate_per_token_loss, which sums gradients")
        fp8_param = getattr(config, "fp8_param", False)  # a model of single layers may come with a ModelParallelConfig
        if ddp_config.fp8_param_gather != fp8_param:
            raise ValueError(
                f"fp8_param_gather ({ddp_config.fp8_param_gather}) must be what fp8_param of the model's "
                f"configuration is ({fp8_param})"
            )
        self.ddp_config = ddp_config
        default = groups_of(module)
        self.grad_comm_pgs = grad_comm_pgs or default
        self.model_comm_pgs = model_comm_pgs or default
        self.bucket_size = None if disable_bucketing else self._useful_bucket_size()

        params = {param: name for name, param in module.named_parameters() if param.requires_grad}
        self.param_to_name = params
        dense = [param for param in params if not is_expert_parallel(param)]
        experts = [param for param in params if is_expert_parallel(param)]
        groups = self.grad_comm_pgs
        self._require_as_many_instances_as_groups()
        self.param_and_grad_buffers = self._make_buffers(dense, groups.dp_cp, groups.intra_dp_cp)
        self.expert_param_and_grad_buffers = self._make_buffers(experts, groups.expt_dp, groups.intra_expt_dp)
        bucket_groups = in_forward_order(partition_buckets(self._all_buffers()), list(params))
        self.bucket_groups = bucket_groups[::-1]  # gradients become complete from the last layer to the first
        self.grad_reducer = GradReducer(self.bucket_groups, params, overlap=ddp_config.overlap_grad_reduce)
        self.weight_gatherer = WeightGatherer(bucket_groups if ddp_config.use_distributed_optimizer else [])
        for param in params:
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            param.register_post_accumulate_grad_hook(_add_to_main_grad)
        if ddp_config.overlap_param_gather:
            self.enable_forward_pre_hook()

    def _require_as_many_instances_as_groups(self) -> None:
        groups = get_pg_size(self.grad_comm_pgs.inter_dist_opt)
        instances = self.ddp_config.num_distributed_optimizer_instances
        if self.ddp_config.use_distributed_optimizer and instances != groups:
            raise ValueError(
                f"num_distributed_optimizer_instances ({instances}) must be that of the process groups ({groups}); "
                "hand it to initialize_model_parallel, too"
            )

    def _useful_bucket_size(self) -> int | None:
        """Several buckets only help where a reduction can start early: overlapped, and on the first stage."""
        if not self.ddp_config.overlap_grad_reduce or get_pg_rank(self.model_comm_pgs.pp) > 0:
            return None
        if self.ddp_config.bucket_size is not None:
            return self.ddp_config.bucket_size
        return max(40_000_000, 1_000_000 * get_pg_size(self.grad_comm_pgs.dp_cp))

    def _make_buffers(
        self, params: list[Parameter], all_replicas: ProcessGroup | None, inside_instance: ProcessGroup | None
    ) -> list[_ParamAndGradBuffer]:
        """One buffer for each pair of types, and one for weights that are kept in fp8."""
        sharded = self.ddp_config.use_distributed_optimizer
        by_kind: dict[tuple[torch.dtype, torch.dtype, bool], list[Parameter]] = {}
        for param in params:
            grad_dtype = torch.float32 if self.ddp_config.grad_reduce_in_fp32 else param.dtype
            in_fp8 = self.ddp_config.fp8_param_gather and is_kept_in_fp8(param)
            by_kind.setdefault((param.dtype, grad_dtype, in_fp8), []).append(param)
        return [
            _ParamAndGradBuffer(
                self.ddp_config,
                param_dtype,
                grad_dtype,
                members,
                inside_instance or all_replicas if sharded else all_replicas,
                self.bucket_size,
                self.param_to_name,
                self._gradient_scaling_factor(all_replicas),
                self.grad_comm_pgs.inter_dist_opt if sharded else None,
                in_fp8,
            )
            for (param_dtype, grad_dtype, in_fp8), members in by_kind.items()
        ]

    def _gradient_scaling_factor(self, group: ProcessGroup | None) -> float:
        """What makes the collectives over `group` yield the mean over data × context ranks.

        An expert's gradient already sums the tokens of all ranks that sent it some; its replicas are fewer.
        """
        if self.config.calculate_per_token_loss:
            return 1.0
        num_replicas = get_pg_size(self.grad_comm_pgs.dp_cp)
        return (get_pg_size(group) if self.ddp_config.average_in_collective else 1) / num_replicas

    def _all_buffers(self) -> list[_ParamAndGradBuffer]:
        return self.param_and_grad_buffers + self.expert_param_and_grad_buffers

    # --- gradients ---

    @property
    def is_last_microbatch(self) -> bool:
        """Whether the next backward is the last one before `finish_grad_sync`."""
        return self.grad_reducer.is_last_microbatch

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.grad_reducer.is_last_microbatch = self.grad_reducer.is_last_microbatch, False
        try:
            yield
        finally:
            self.grad_reducer.is_last_microbatch = before

    def start_grad_sync(self, *unused: Any) -> None:
        """Launch the reduction of every bucket that is not launched yet."""
        self.grad_reducer.start()

    def finish_grad_sync(self) -> None:
        """Wait for the reduction of every bucket, launching what has not been."""
        self.grad_reducer.finish()

    def report_bad_gradients_to(self, complain: Callable[[str], None]) -> None:
        for bucket_group in self.bucket_groups:
            bucket_group.complain = complain

    # --- weights ---

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Gather sharded weights from their owners.

        Overlapped, this launches the gathering of weights that are stale and returns; otherwise it gathers all
        weights and returns when they have arrived.

        Args:
            force_sync: gather all weights and wait in any case.
            force_dispatch: gather all weights in any case.
        """
        overlapped = self.ddp_config.overlap_param_gather
        if force_sync or force_dispatch or not overlapped:
            self.weight_gatherer.weights_changed()
        self.weight_gatherer.start()
        if force_sync or not overlapped:
            self.weight_gatherer.settle()

    def finish_param_sync(self, *, widen: bool = True) -> None:
        """Afterwards every rank has all weights; call it on all ranks before reading or writing any of them.

        Args:
            widen: those that are kept in fp8 are in their own type until the next step of the optimizer, or
                `narrow_weights`.
        """
        self.weight_gatherer.finish()
        if widen:
            for buffer in self._all_buffers():
                buffer.widen_weights()

    def narrow_weights(self) -> None:
        """End the reading of weights that are kept in fp8; what was written into them and not handed to the optimizer
        is gone."""
        for buffer in self._all_buffers():
            buffer.narrow_weights()

    def settle_param_sync(self) -> None:
        """Wait for weights that are in flight, without launching more: the optimizer is about to write its part."""
        self.weight_gatherer.settle()

    def weights_changed(self, *, launch: bool = False) -> None:
        """The optimizer has written its part of the weights. All are gathered now; overlapped, only the first
        bucket is launched, or none where `align_param_gather` leaves that to the schedule, unless `launch`."""
        self.weight_gatherer.weights_changed()
        if not self.ddp_config.overlap_param_gather:
            self.weight_gatherer.finish()
        elif launch or not self.ddp_config.align_param_gather:
            self.weight_gatherer.start_next()

    def enable_forward_pre_hook(self) -> None:
        """From now on the forward of each submodule waits for its weights; so it is from the start if overlapped."""
        self.weight_gatherer.attach(self.module)

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """From now on nothing waits.

        Args:
            param_sync: gather what is stale first.
        """
        self.weight_gatherer.detach()
        if param_sync:
            self.finish_param_sync()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self.finish_param_sync()
        return super().state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        self.finish_param_sync()
        return super().state_dict_for_save_checkpoint(prefix, keep_vars)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.finish_param_sync()
        return super().sharded_state_dict(prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.finish_param_sync()
        return super().load_state_dict(state_dict, strict, assign)

    # --- all buffers ---

    def scale_gradients(self, scaling_factor: float) -> None:
        for buffer in self._all_buffers():
            buffer.scale_gradients(scaling_factor)

    def zero_grad_buffer(self) -> None:
        for param in self.param_to_name:
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        for buffer in self._all_buffers():
            buffer.reset()

    def broadcast_params(self) -> None:
        self.finish_param_sync()
        groups = self.grad_comm_pgs
        for param in self.module.parameters():
            group = groups.expt_dp if is_expert_parallel(param) else groups.dp_cp
            if group is not None and get_pg_size(group) > 1:
                broadcast(param.data, group_src=0, group=group, what="initial weights")


def is_expert_parallel(param: Parameter) -> bool:
    """Whether data × context parallel ranks hold different experts here instead of replicas."""
    return not getattr(param, "allreduce", True)


def _add_to_main_grad(param: Parameter) -> None:
    """Runs when autograd has accumulated `param.grad` in a backward pass."""
    grad, param.grad = param.grad, None
    # A kernel that adds to main_grad itself may still have to return some gradient, to keep autograd going.
    is_placeholder = getattr(param, "grad_added_to_main_grad", False) and not getattr(param, "zero_out_wgrad", False)
    if grad is not None and not is_placeholder:
        accumulate(param.main_grad, grad)  # type: ignore[attr-defined]


def accumulate(total: Tensor, addend: Tensor) -> None:
    """`total += addend`, in the type of `total`.

    torch adds mixed types one by one on the CPU; widened piece by piece in cache it is four times as fast and
    the same to the bit.
    """
    if total.dtype == addend.dtype or total.device.type != "cpu":
        total.add_(addend)
        return
    pieces = zip(total.view(-1).split(_PIECE), addend.reshape(-1).split(_PIECE))
    for total_piece, addend_piece in pieces:
        total_piece.add_(addend_piece.to(total.dtype))


_PIECE = 2**18
"""Elements that are widened at a time: 1 MiB of fp32."""
