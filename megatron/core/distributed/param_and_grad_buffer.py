"""Flat storage for the gradients (and, sharded, the weights) of a data-parallel replica, and its collectives.

Buckets are the unit of communication: one all-reduce each, or with the distributed optimizer one
reduce-scatter of gradients and one all-gather of weights each (ZeRO stage 1, arXiv:1910.02054, section 5).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.distributed.bucket_layout import BucketLayout, lay_out_buffer
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.utils import get_pg_rank, get_pg_size

logger = logging.getLogger(__name__)

# Newer torch deprecates the `_tensor` spellings, older torch only has them.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

NORMS_REMEMBERED = 100
LARGE_NORM_FACTOR = 10.0


@dataclass(eq=False)
class _ParamAndGradBucket:
    """A contiguous piece of a buffer that travels in one collective."""

    layout: BucketLayout
    params: list[Parameter]
    """In the order of the buffer."""
    grad_data: Tensor
    """[end - start], padding included."""
    param_data: Tensor | None
    """The same elements of the weights, when they are sharded."""

    def shard(self, data: Tensor, group: ProcessGroup | None) -> Tensor:
        """View of the part of `data` (this bucket's gradients or weights) that this rank owns."""
        start, end = self.layout.shard(get_pg_rank(group), get_pg_size(group))
        return data[start - self.layout.start : end - self.layout.start]


class _ParamAndGradBuffer:
    """Gradients of `params` in one tensor; each parameter's `main_grad` becomes a view of it.

    With the distributed optimizer the weights move into a tensor of the same layout, and `param.data` become
    views of that. Elements that belong to no parameter are zero for ever.

    Args:
        ddp_config: which of the two forms, and how to pad.
        param_dtype: type that all `params` have.
        grad_dtype: type that gradients are accumulated and reduced in.
        params: in the order of the forward pass.
        data_parallel_group: ranks with replicas of these parameters; weights are sharded over it.
        bucket_size: elements after which a bucket closes; `None` is a single bucket.
        param_to_name: for messages.
        gradient_scaling_factor: multiplies every gradient before it is summed over `data_parallel_group`.
    """

    def __init__(
        self,
        ddp_config: DistributedDataParallelConfig,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        params: Sequence[Parameter],
        data_parallel_group: ProcessGroup | None,
        bucket_size: int | None,
        param_to_name: Mapping[Parameter, str],
        gradient_scaling_factor: float,
    ) -> None:
        self.ddp_config = ddp_config
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype
        self.params = list(params)
        self.data_parallel_group = data_parallel_group
        self.gradient_scaling_factor = gradient_scaling_factor
        self.param_to_name = param_to_name
        sharded = ddp_config.use_distributed_optimizer
        self.layout = lay_out_buffer(
            [param.numel() for param in self.params],
            bucket_size=bucket_size,
            num_shards=get_pg_size(data_parallel_group) if sharded else None,
            isolated={i for i, param in enumerate(self.params) if getattr(param, "shared_embedding", False)},
            pad_for_bus_bandwidth=ddp_config.pad_buckets_for_high_nccl_busbw,
        )
        device = self.params[0].device
        self.grad_data = torch.zeros(self.layout.numel, dtype=grad_dtype, device=device)
        self.param_data: Tensor | None = None
        if sharded:
            self.param_data = torch.zeros(self.layout.numel, dtype=param_dtype, device=device)
        self.param_spans = dict(zip(self.params, self.layout.spans, strict=True))
        for param, (start, end) in self.param_spans.items():
            param.main_grad = self.grad_data[start:end].view(param.shape)  # type: ignore[attr-defined]
            if self.param_data is not None:
                view = self.param_data[start:end].view(param.shape)
                view.copy_(param.data)
                param.data = view
        self.buckets = [self._bucket(layout) for layout in self.layout.buckets]

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.layout.numel

    @property
    def numel_unpadded(self) -> int:
        """Elements without the padding at the ends of buckets."""
        return self.layout.numel_unpadded

    def _bucket(self, layout: BucketLayout) -> _ParamAndGradBucket:
        elements = slice(layout.start, layout.end)
        return _ParamAndGradBucket(
            layout,
            [self.params[i] for i in layout.param_indices],
            self.grad_data[elements],
            None if self.param_data is None else self.param_data[elements],
        )

    def reset(self) -> None:
        """Zero all gradients."""
        self.grad_data.zero_()

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiply all gradients."""
        self.grad_data.mul_(scaling_factor)


@dataclass(eq=False)
class _ParamAndGradBucketGroup:
    """Buckets of one buffer whose collectives start together.

    `start_*` launches asynchronously, `finish_*` waits and launches first if nobody has. On a group of one
    rank both are local.
    """

    buffer: _ParamAndGradBuffer
    buckets: list[_ParamAndGradBucket]
    largest_norms: list[float] = field(default_factory=list)
    """Norms that `check_for_large_grads` has seen so far, at most `NORMS_REMEMBERED`."""

    _grads_in_flight: list[Any] | None = None
    _params_in_flight: list[Any] | None = None

    @property
    def ddp_config(self) -> DistributedDataParallelConfig:
        """Settings of the buffer."""
        return self.buffer.ddp_config

    @property
    def group(self) -> ProcessGroup | None:
        """Ranks that hold replicas."""
        return self.buffer.data_parallel_group

    def start_grad_sync(self) -> None:
        """Check and scale the gradients, then reduce them over the group."""
        assert self._grads_in_flight is None, "gradients are being reduced already"
        for bucket in self.buckets:
            self._check_grads(bucket)
            if self.buffer.gradient_scaling_factor != 1.0:
                bucket.grad_data.mul_(self.buffer.gradient_scaling_factor)
        self._grads_in_flight = []
        if get_pg_size(self.group) == 1:
            return
        averages_in_flight = self.ddp_config.average_in_collective and not self._averages_locally
        op = dist.ReduceOp.AVG if averages_in_flight else dist.ReduceOp.SUM
        for bucket in self.buckets:
            if self.ddp_config.use_distributed_optimizer:
                shard = bucket.shard(bucket.grad_data, self.group)
                work = _reduce_scatter(shard, bucket.grad_data, op=op, group=self.group, async_op=True)
            else:
                work = dist.all_reduce(bucket.grad_data, op=op, group=self.group, async_op=True)
            self._grads_in_flight.append(work)

    def ensure_grad_sync_started(self) -> None:
        """`start_grad_sync` unless it has been called since the last `finish_grad_sync`."""
        if self._grads_in_flight is None:
            self.start_grad_sync()

    def finish_grad_sync(self) -> None:
        """Afterwards the gradients (sharded: the owned parts) are reduced; the other parts are undefined."""
        self.ensure_grad_sync_started()
        _wait(self._grads_in_flight)
        self._grads_in_flight = None
        if self.ddp_config.average_in_collective and self._averages_locally:
            for bucket in self.buckets:
                bucket.grad_data.div_(get_pg_size(self.group))

    @property
    def _averages_locally(self) -> bool:
        """Older gloo has no average: sum and divide instead."""
        return get_pg_size(self.group) > 1 and dist.get_backend(self.group) == "gloo"

    def start_param_sync(self) -> None:
        """Gather the weights that the other ranks have updated."""
        assert self._params_in_flight is None, "weights are being gathered already"
        self._params_in_flight = []
        if get_pg_size(self.group) == 1:
            return
        for bucket in self.buckets:
            assert bucket.param_data is not None, "only the distributed optimizer has weights to gather"
            shard = bucket.shard(bucket.param_data, self.group)
            work = _all_gather(bucket.param_data, shard, group=self.group, async_op=True)
            self._params_in_flight.append(work)

    def finish_param_sync(self) -> None:
        """Afterwards every rank has all weights."""
        if self._params_in_flight is None:
            self.start_param_sync()
        _wait(self._params_in_flight)
        self._params_in_flight = None

    def _check_grads(self, bucket: _ParamAndGradBucket) -> None:
        if self.ddp_config.check_for_nan_in_grad:
            # One pass and no temporary: the sum of finite gradients is finite short of 1e38.
            total = bucket.grad_data.sum(dtype=torch.float32)
            if not torch.isfinite(total):
                self._raise_for_first_bad_param(bucket)
        if self.ddp_config.check_for_large_grads:
            self._warn_of_large_norm(bucket)

    def _raise_for_first_bad_param(self, bucket: _ParamAndGradBucket) -> None:
        in_forward_order = reversed(bucket.params)
        for param in in_forward_order:
            bad = ~torch.isfinite(param.main_grad)  # type: ignore[attr-defined]
            if bad.any():
                raise RuntimeError(
                    f"gradient of {self.buffer.param_to_name[param]} has {int(bad.sum())} NaN or infinite "
                    f"values of {param.numel()} on rank {_global_rank()}, before the data-parallel reduction"
                )

    def _warn_of_large_norm(self, bucket: _ParamAndGradBucket) -> None:
        norm = float(torch.linalg.vector_norm(bucket.grad_data, dtype=torch.float32))
        ceiling = LARGE_NORM_FACTOR * max(self.largest_norms, default=float("inf"))
        if len(self.largest_norms) < NORMS_REMEMBERED:
            self.largest_norms.append(norm)
        elif norm > ceiling:
            logger.warning(
                "gradient norm %.3e on rank %d is more than %g times the largest of the first %d (%.3e)",
                *(norm, _global_rank(), LARGE_NORM_FACTOR, NORMS_REMEMBERED, ceiling / LARGE_NORM_FACTOR),
            )


def partition_buckets(buffers: Sequence[_ParamAndGradBuffer]) -> list[_ParamAndGradBucketGroup]:
    """One group for each bucket, in the order in which gradients become ready."""
    return [_ParamAndGradBucketGroup(buffer, [bucket]) for buffer in buffers for bucket in buffer.buckets]


def _wait(in_flight: list[Any] | None) -> None:
    for work in in_flight or ():
        work.wait()


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
