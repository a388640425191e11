"""Flat storage for the gradients (and, sharded, the weights) of a data-parallel replica, cut into buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron.core.collectives import start_all_gather
from megatron.core.distributed.bucket_layout import BucketLayout, lay_out_buffer
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.utils import get_pg_rank, get_pg_size


@dataclass(eq=False)
class _ParamAndGradBucket:
    """A contiguous piece of a buffer that travels in one collective."""

    layout: BucketLayout
    params: list[Parameter]
    """In the order of the buffer."""
    grad_data: Tensor
    """[end - start], padding included."""
    param_data: Tensor | None
    """The same elements of the weights, when they are sharded; bytes where these are kept in fp8."""

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
        gradient_scaling_factor: multiplies every gradient before it is summed over all replicas.
        inter_instance_group: ranks that own the same part of the buffer in several instances of the distributed
            optimizer; None or one rank where there is one instance.
        in_fp8: the optimizer may keep the weights in fp8: see `keep_in_fp8`.
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
        inter_instance_group: ProcessGroup | None = None,
        in_fp8: bool = False,
    ) -> None:
        self.ddp_config = ddp_config
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype
        self.params = list(params)
        self.data_parallel_group = data_parallel_group
        self.inter_instance_group = inter_instance_group
        self.gradient_scaling_factor = gradient_scaling_factor
        self.param_to_name = param_to_name
        self.in_fp8 = in_fp8
        self.bytes_of_weights: Tensor | None = None
        """Weights that are kept in fp8: e4m3, as uint8, which every backend of communication moves."""
        self._write_own: Callable[[Tensor], None] | None = None
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
                self.param_data[start:end].copy_(param.data.view(-1))
        if self.param_data is not None:
            self._point_weights_to(self.param_data)
        self.buckets = [self._bucket(layout) for layout in self.layout.buckets]

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.layout.numel

    @property
    def numel_unpadded(self) -> int:
        """Elements without the padding at the ends of buckets."""
        return self.layout.numel_unpadded

    @property
    def num_replicas(self) -> int:
        """Ranks over which gradients are summed."""
        return get_pg_size(self.data_parallel_group) * get_pg_size(self.inter_instance_group)

    def _bucket(self, layout: BucketLayout) -> _ParamAndGradBucket:
        elements = slice(layout.start, layout.end)
        return _ParamAndGradBucket(
            layout,
            [self.params[i] for i in layout.param_indices],
            self.grad_data[elements],
            None if self.param_data is None else self.param_data[elements],
        )

    def _point_weights_to(self, data: Tensor) -> None:
        for param, (start, end) in self.param_spans.items():
            param.data = data[start:end].view(param.shape)

    # --- weights in fp8 ---

    def keep_in_fp8(self, write_own: Callable[[Tensor], None]) -> None:
        """From now on buckets hold bytes, which the optimizer fills; `narrow_weights` lets the parameters be these.

        Args:
            write_own: fills this rank's parts of a tensor like the buffer, in the weights' own type.
        """
        assert self.in_fp8 and self.param_data is not None, "only sharded weights of linear layers are kept in fp8"
        self._write_own = write_own
        self.bytes_of_weights = torch.zeros(self.numel, dtype=torch.uint8, device=self.param_data.device)
        for bucket in self.buckets:
            bucket.param_data = self.bytes_of_weights[bucket.layout.start : bucket.layout.end]

    @property
    def is_wide(self) -> bool:
        """Whether the weights are in their own type at the moment."""
        return self.param_data is not None

    def narrow_weights(self) -> None:
        """Let parameters that are kept in fp8 be so; what was written into them since `widen_weights` is gone, unless
        the optimizer has taken it over."""
        if self.bytes_of_weights is not None:
            self.param_data = None
            self._point_weights_to(self.bytes_of_weights.view(torch.float8_e4m3fn))

    def widen_weights(self) -> None:
        """Let parameters that are kept in fp8 be what they are cast from, in their own type, to be read and written.

        Communicates: all-gathers of the buckets, unless they are so already.
        """
        if self.bytes_of_weights is None or self.is_wide:
            return
        assert self._write_own is not None
        wide = torch.zeros(self.numel, dtype=self.param_dtype, device=self.bytes_of_weights.device)
        self._write_own(wide)
        for bucket in self.buckets:
            whole = wide[bucket.layout.start : bucket.layout.end]
            part = bucket.shard(whole, self.data_parallel_group)
            start_all_gather(part, self.data_parallel_group, into=whole, what="weights kept in fp8").wait()
        self.param_data = wide
        self._point_weights_to(wide)

    def reset(self) -> None:
        """Zero all gradients."""
        self.grad_data.zero_()

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiply all gradients."""
        self.grad_data.mul_(scaling_factor)
