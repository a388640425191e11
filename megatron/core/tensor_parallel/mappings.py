"""Every tensor- and sequence-parallel communication of activations: what forward does, what backward does.

With one rank each of them is the identity. Sequence parallelism: Korthikanti et al., arXiv:2205.05198,
section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives
from megatron.core.tensor_parallel.utils import split_tensor_along_last_dim
from megatron.core.utils import divide, get_pg_rank, get_pg_size, get_tensor_model_parallel_group_if_none

# --- the collectives themselves ---


def _reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group; in place."""
    if get_pg_size(group) == 1:
        return x
    x = x.contiguous()
    collectives.all_reduce(x, group=group)
    return x


def _split_last_dim(x: Tensor, group: ProcessGroup | None) -> Tensor:
    size = get_pg_size(group)
    return x if size == 1 else split_tensor_along_last_dim(x, size)[get_pg_rank(group)].contiguous()


def _split_first_dim(x: Tensor, group: ProcessGroup | None) -> Tensor:
    size = get_pg_size(group)
    if size == 1:
        return x
    rows = divide(x.size(0), size)
    return x.narrow(0, rows * get_pg_rank(group), rows).contiguous()


def _gather_first_dim(x: Tensor, group: ProcessGroup | None, split_sizes: list[int] | None = None) -> Tensor:
    size = get_pg_size(group)
    if size == 1:
        return x
    x = x.contiguous()
    if split_sizes is None:
        gathered = x.new_empty(size * x.size(0), *x.shape[1:])
        collectives.all_gather_into_tensor(gathered, x, group=group)
        return gathered
    longest = max(split_sizes)  # gloo gathers tensors of one size only
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: x.size(0)] = x
    parts = _gather_first_dim(padded, group).split(longest)
    return torch.cat([part[:rows] for part, rows in zip(parts, split_sizes)])


def _gather_last_dim(x: Tensor, group: ProcessGroup | None) -> Tensor:
    size = get_pg_size(group)
    if size == 1:
        return x
    return torch.cat(_gather_first_dim(x.unsqueeze(0), group).unbind(0), dim=-1)


def _reduce_scatter_first_dim(x: Tensor, group: ProcessGroup | None, split_sizes: list[int] | None = None) -> Tensor:
    size = get_pg_size(group)
    if size == 1:
        return x
    x = x.contiguous()
    if split_sizes is None:
        scattered = x.new_empty(divide(x.size(0), size), *x.shape[1:])
        collectives.reduce_scatter_tensor(scattered, x, group=group)
        return scattered
    longest = max(split_sizes)
    padded = x.new_zeros(size * longest, *x.shape[1:])
    for target, part in zip(padded.split(longest), x.split(split_sizes)):
        target[: part.size(0)] = part
    return _reduce_scatter_first_dim(padded, group)[: split_sizes[get_pg_rank(group)]]


def _reduce_scatter_last_dim(x: Tensor, group: ProcessGroup | None) -> Tensor:
    size = get_pg_size(group)
    if size == 1:
        return x
    stacked = torch.cat(split_tensor_along_last_dim(x, size))
    return _reduce_scatter_first_dim(stacked, group)


def _all_to_all(
    x: Tensor, group: ProcessGroup | None, output_splits: list[int] | None, input_splits: list[int] | None
) -> Tensor:
    if get_pg_size(group) == 1:
        return x
    x = x.contiguous()
    received = torch.empty_like(x) if output_splits is None else x.new_empty(sum(output_splits), *x.shape[1:])
    collectives.all_to_all(received, x, output_splits, input_splits, group=group)
    return received


# --- pairs of forward and backward ---


class _CopyToModelParallelRegion(torch.autograd.Function):
    """Identity; backward all-reduces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient may be shared with another branch of the graph: reduce a copy of it.
        return _reduce(grad.clone() if get_pg_size(ctx.group) > 1 else grad, ctx.group), None


class _ReduceFromModelParallelRegion(torch.autograd.Function):
    """All-reduce; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        return _reduce(x.clone() if get_pg_size(group) > 1 else x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _ScatterToModelParallelRegion(torch.autograd.Function):
    """This rank's part of the last dimension; backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _split_last_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather_last_dim(grad, ctx.group), None


class _GatherFromModelParallelRegion(torch.autograd.Function):
    """All-gather along the last dimension; backward keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gather_last_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _split_last_dim(grad, ctx.group), None


class _ScatterToSequenceParallelRegion(torch.autograd.Function):
    """This rank's part of the first dimension; backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _split_first_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather_first_dim(grad, ctx.group), None


class _GatherFromSequenceParallelRegion(torch.autograd.Function):
    """All-gather along the first dimension; backward reduce-scatters.

    Where every rank computes the same gradient, backward only keeps this rank's part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tensor_parallel_output_grad: bool,
        group: ProcessGroup | None,
        split_sizes: list[int] | None,
    ) -> Tensor:
        ctx.group, ctx.split_sizes, ctx.partial = group, split_sizes, tensor_parallel_output_grad
        return _gather_first_dim(x, group, split_sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.partial:
            return _reduce_scatter_first_dim(grad, ctx.group, ctx.split_sizes), None, None, None
        if ctx.split_sizes is not None:
            return grad.split(ctx.split_sizes)[get_pg_rank(ctx.group)], None, None, None
        return _split_first_dim(grad, ctx.group), None, None, None


class _ReduceScatterToSequenceParallelRegion(torch.autograd.Function):
    """Reduce-scatter along the first dimension; backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None, split_sizes: list[int] | None) -> Tensor:
        ctx.group, ctx.split_sizes = group, split_sizes
        return _reduce_scatter_first_dim(x, group, split_sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather_first_dim(grad, ctx.group, ctx.split_sizes), None, None


class _AllGatherLastDim(torch.autograd.Function):
    """All-gather along the last dimension; backward reduce-scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gather_last_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter_last_dim(grad, ctx.group), None


class _ReduceScatterLastDim(torch.autograd.Function):
    """Reduce-scatter along the last dimension; backward all-gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _reduce_scatter_last_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather_last_dim(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    """All-to-all along the first dimension; backward is the inverse all-to-all."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: ProcessGroup | None,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
    ) -> Tensor:
        ctx.group, ctx.output_splits, ctx.input_splits = group, output_splits, input_splits
        return _all_to_all(x, group, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.group, ctx.input_splits, ctx.output_splits), None, None, None


# --- the public functions; `group` defaults to the tensor parallel group ---


def copy_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Identity; backward all-reduces."""
    return _CopyToModelParallelRegion.apply(input_, get_tensor_model_parallel_group_if_none(group))


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """All-reduce; backward is the identity."""
    return _ReduceFromModelParallelRegion.apply(input_, get_tensor_model_parallel_group_if_none(group))


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[..., h] -> [..., h/tp], this rank's part; backward all-gathers."""
    return _ScatterToModelParallelRegion.apply(input_, get_tensor_model_parallel_group_if_none(group))


def gather_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[..., h/tp] -> [..., h] by all-gather; backward keeps this rank's part."""
    return _GatherFromModelParallelRegion.apply(input_, get_tensor_model_parallel_group_if_none(group))


def scatter_to_sequence_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[s, ...] -> [s/tp, ...], this rank's part; backward all-gathers."""
    return _ScatterToSequenceParallelRegion.apply(input_, get_tensor_model_parallel_group_if_none(group))


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: ProcessGroup | None = None,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """[s/tp, ...] -> [s, ...] by all-gather.

    Backward reduce-scatters if each rank's gradient is a part of the sum (`tensor_parallel_output_grad`),
    else it keeps this rank's part. `output_split_sizes` are the rows of each rank where they differ.
    """
    return _GatherFromSequenceParallelRegion.apply(
        input_,
        tensor_parallel_output_grad,
        get_tensor_model_parallel_group_if_none(group),
        output_split_sizes,
    )


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: ProcessGroup | None = None,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """[s, ...] -> [s/tp, ...] by reduce-scatter; backward all-gathers."""
    return _ReduceScatterToSequenceParallelRegion.apply(
        input_, get_tensor_model_parallel_group_if_none(group), input_split_sizes
    )


def all_gather_last_dim_from_tensor_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[..., h/tp] -> [..., h] by all-gather; backward reduce-scatters."""
    return _AllGatherLastDim.apply(input_, get_tensor_model_parallel_group_if_none(group))


def reduce_scatter_last_dim_to_tensor_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[..., h] -> [..., h/tp] by reduce-scatter; backward all-gathers."""
    return _ReduceScatterLastDim.apply(input_, get_tensor_model_parallel_group_if_none(group))


def all_to_all(
    group: ProcessGroup | None,
    input_: Tensor,
    output_split_sizes_: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> Tensor:
    """Exchange rows with every rank of `group`; backward is the inverse exchange."""
    return _AllToAll.apply(input_, group, output_split_sizes_, input_split_sizes)


def all_to_all_sp2hp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[n/tp, h] -> [n, h/tp]: from a part of the tokens to a part of the hidden size; backward is `hp2sp`."""
    group = get_tensor_model_parallel_group_if_none(group)
    parts = split_tensor_along_last_dim(input_.reshape(-1, input_.size(-1)), get_pg_size(group))
    return all_to_all(group, torch.cat(parts))


def all_to_all_hp2sp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[n, h/tp] -> [n/tp, h]: from a part of the hidden size to a part of the tokens; backward is `sp2hp`."""
    group = get_tensor_model_parallel_group_if_none(group)
    exchanged = all_to_all(group, input_.reshape(-1, input_.size(-1)))
    return torch.cat(exchanged.chunk(get_pg_size(group)), dim=-1)


def gather_features(input_: Tensor, sequence_parallel: bool, group: ProcessGroup | None = None) -> Tensor:
    """[s, b, h/tp] of all tokens -> [s, b, h] by all-gather; sequence parallel [s/tp, b, h] by all-to-all.

    What follows must give the same whole gradient on every rank, or that of each rank's tokens.
    """
    group = get_tensor_model_parallel_group_if_none(group)
    if get_pg_size(group) == 1:
        return input_
    if sequence_parallel:
        return all_to_all_hp2sp(input_, group).view(-1, input_.size(1), input_.size(-1) * get_pg_size(group))
    return gather_from_tensor_model_parallel_region(input_, group)
