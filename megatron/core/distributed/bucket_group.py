"""The collectives of a bucket: gradients are reduced, and with the distributed optimizer weights are gathered.

Without it a bucket's gradients are all-reduced over all replicas. With it (ZeRO stage 1, arXiv:1910.02054,
section 5) they are reduce-scattered, and each rank's part of the weights is all-gathered; where several
instances of the optimizer's state exist, both stay inside an instance, and the reduced parts are then
all-reduced across instances.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import InFlight, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.gradient_checks import LargeNormWarning, check_finite_gradients, refuse
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket, _ParamAndGradBuffer
from megatron.core.utils import get_pg_size


class Weights(enum.Enum):
    """What a rank holds of a bucket's weights."""

    WHOLE = enum.auto()
    """All of them, up to date."""
    STALE = enum.auto()
    """Other ranks have updated their parts since."""
    IN_FLIGHT = enum.auto()
    """Those parts are on their way; nobody may read or write the bucket."""


@dataclass(eq=False)
class _ParamAndGradBucketGroup:
    """Buckets of one buffer whose collectives start together. On a group of one rank there is nothing to exchange.

    Gradients: `start_grad_sync`, then `finish_grad_sync`; between the two `advance_grad_sync` may be called at any
    time. Weights: `start_param_sync`, then `finish_param_sync`, after the owner has set `weights` to STALE.
    """

    buffer: _ParamAndGradBuffer
    buckets: list[_ParamAndGradBucket]
    weights: Weights = Weights.WHOLE
    large_norms: LargeNormWarning = field(default_factory=LargeNormWarning)
    complain: Callable[[str], None] = refuse
    """Is told about gradients that are not finite."""

    _reducing: list[InFlight] | None = None
    """Collectives inside the instance; None while no reduction is under way."""
    _across: list[InFlight] | None = None
    """Collectives across instances; None before they are launched."""
    _gathering: list[InFlight] = field(default_factory=list)

    @property
    def ddp_config(self) -> DistributedDataParallelConfig:
        """Settings of the buffer."""
        return self.buffer.ddp_config

    @property
    def group(self) -> ProcessGroup | None:
        """Ranks among which a bucket is cut, or that hold replicas of it."""
        return self.buffer.data_parallel_group

    # --- gradients ---

    @property
    def is_grad_sync_started(self) -> bool:
        """Whether a reduction is under way."""
        return self._reducing is not None

    def start_grad_sync(self) -> None:
        """Check and scale the gradients, then launch their reduction over the group."""
        assert self._reducing is None, "gradients are being reduced already"
        for bucket in self.buckets:
            self._check(bucket)
            if self.buffer.gradient_scaling_factor != 1.0:
                bucket.grad_data.mul_(self.buffer.gradient_scaling_factor)
        self._reducing = [self._launch_inside(bucket) for bucket in self.buckets]
        if not device.is_cpu():  # streams order what follows; on a CPU somebody has to look whether it has arrived
            self._launch_across()

    def advance_grad_sync(self) -> bool:
        """Launch what follows inside the instance, if that has arrived; whether it is launched. Never waits."""
        if self._reducing is not None and self._across is None and all(one.is_done() for one in self._reducing):
            self._launch_across()
        return self._across is not None

    def finish_grad_sync(self) -> None:
        """Afterwards the gradients (sharded: the owned parts) are reduced; the other parts are undefined."""
        assert self._reducing is not None, "start_grad_sync comes first"
        if self._across is None:
            self._launch_across()
        _wait(self._reducing)
        _wait(self._across)
        self._reducing = self._across = None
        if self._averages_locally:
            for bucket in self.buckets:
                bucket.grad_data.div_(self.buffer.num_replicas)

    def _check(self, bucket: _ParamAndGradBucket) -> None:
        if self.ddp_config.check_for_nan_in_grad:
            names = self.buffer.param_to_name
            check_finite_gradients(bucket.grad_data, bucket.params, names, self.complain)
        if self.ddp_config.check_for_large_grads:
            self.large_norms.look_at(bucket.grad_data)

    def _launch_inside(self, bucket: _ParamAndGradBucket) -> InFlight:
        if self.ddp_config.use_distributed_optimizer:
            part = bucket.shard(bucket.grad_data, self.group)
            return start_reduce_scatter(bucket.grad_data, self.group, self._operation, into=part, what="gradients")
        return start_all_reduce(bucket.grad_data, self.group, self._operation, what="gradients")

    def _launch_across(self) -> None:
        """All-reduce the owned parts over the instances, once they are summed inside the instance."""
        self._across = []
        instances = self.buffer.inter_instance_group
        if get_pg_size(instances) == 1:
            return
        with _side_stream():
            _wait(self._reducing)
            self._reducing = []  # gloo writes the result of a reduce-scatter when it is waited for, each time
            for bucket in self.buckets:
                part = bucket.shard(bucket.grad_data, self.group)
                self._across.append(start_all_reduce(part, instances, self._operation, "gradients across instances"))

    @property
    def _operation(self) -> dist.ReduceOp.RedOpType:
        averages = self.ddp_config.average_in_collective and not self._averages_locally
        return dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM

    @property
    def _averages_locally(self) -> bool:
        """Older gloo has no average: sum and divide instead."""
        some_group = self.group if get_pg_size(self.group) > 1 else self.buffer.inter_instance_group
        wanted = self.ddp_config.average_in_collective and get_pg_size(some_group) > 1
        return wanted and dist.get_backend(some_group) == "gloo"

    # --- weights ---

    def start_param_sync(self) -> None:
        """Launch the gathering of the weights that the other ranks have updated."""
        assert self.weights is not Weights.IN_FLIGHT, "weights are being gathered already"
        self.weights = Weights.IN_FLIGHT
        for bucket in self.buckets:
            assert bucket.param_data is not None, "only the distributed optimizer has weights to gather"
            part = bucket.shard(bucket.param_data, self.group)
            self._gathering.append(start_all_gather(part, self.group, into=bucket.param_data, what="weights"))

    def finish_param_sync(self) -> None:
        """Wait for what is in flight; afterwards every rank has all weights."""
        assert self.weights is Weights.IN_FLIGHT, "start_param_sync comes first"
        _wait(self._gathering)
        self._gathering = []
        self.weights = Weights.WHOLE


def partition_buckets(buffers: Sequence[_ParamAndGradBuffer]) -> list[_ParamAndGradBucketGroup]:
    """One group for each bucket of each buffer."""
    return [_ParamAndGradBucketGroup(buffer, [bucket]) for buffer in buffers for bucket in buffer.buckets]


_streams: list[Any] = []


def _side_stream() -> AbstractContextManager[Any]:
    """The stream that waits for one collective to launch the next, so that computing does not wait with it."""
    if device.device_type() != "cuda":
        return nullcontext()
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return torch.cuda.stream(_streams[0])


def _wait(in_flight: Sequence[InFlight] | None) -> None:
    for collective in in_flight or ():
        collective.wait()


__all__ = ["Weights", "_ParamAndGradBucketGroup", "partition_buckets"]
