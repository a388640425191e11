"""Tensors between neighbouring pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import default_process_groups

Shape = Sequence[int] | torch.Size


def exchange(
    sends: list[tuple[Tensor, int]],
    receives: list[tuple[Shape, int]],
    config: ModelParallelConfig,
    group: ProcessGroup,
) -> list[Tensor]:
    """Send and receive all of these at once; the received tensors, which require gradients.

    Args:
        sends: (tensor, stage of the receiver).
        receives: (expected shape, stage of the sender). With `config.variable_seq_lengths` the senders'
            shapes are exchanged first and the expected ones are ignored.
    """
    dtype = _pipeline_dtype(config)
    if config.variable_seq_lengths:
        shapes = _exchange_shapes(sends, receives, group)
        receives = [(shape, peer) for shape, (_, peer) in zip(shapes, receives)]
    where = device.current_device()
    buffers = [torch.empty(tuple(shape), dtype=dtype, device=where, requires_grad=True) for shape, _ in receives]
    _run(
        [(t.detach(), peer) for t, peer in sends],
        [(b.data, peer) for b, (_, peer) in zip(buffers, receives)],
        group,
    )
    return buffers


def _pipeline_dtype(config: ModelParallelConfig) -> torch.dtype:
    if config.pipeline_dtype is None:
        raise ValueError("pipeline_dtype must be set when pipeline_model_parallel_size > 1")
    return torch.float32 if getattr(config, "fp32_residual_connection", False) else config.pipeline_dtype


def _exchange_shapes(
    sends: list[tuple[Tensor, int]], receives: list[tuple[Shape, int]], group: ProcessGroup
) -> list[list[int]]:
    where = device.current_device()
    known = [(torch.tensor(t.shape, dtype=torch.int64, device=where), peer) for t, peer in sends]
    received = [(torch.empty(3, dtype=torch.int64, device=where), peer) for _, peer in receives]
    _run(known, received, group)
    return [shape.tolist() for shape, _ in received]


def _run(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: ProcessGroup) -> None:
    ops = [dist.P2POp(dist.isend, t.contiguous(), group=group, group_peer=peer) for t, peer in sends]
    ops += [dist.P2POp(dist.irecv, t, group=group, group_peer=peer) for t, peer in receives]
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()


# --- the public functions by neighbour ---


def _pp_group() -> ProcessGroup:
    group = default_process_groups().pp
    assert group is not None
    return group


def _with_neighbours(
    config: ModelParallelConfig,
    send_next: Tensor | None = None,
    send_prev: Tensor | None = None,
    recv_next: Shape | None = None,
    recv_prev: Shape | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(received from the previous stage, received from the next stage)."""
    group = _pp_group()
    after, before = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
    sends = [(t, peer) for t, peer in ((send_prev, before), (send_next, after)) if t is not None]
    # With two stages both neighbours are one rank, which takes messages in the order in which they were sent:
    # what it sends to its previous stage comes first, and comes from this stage's next.
    receives = [(shape, peer) for shape, peer in ((recv_next, after), (recv_prev, before)) if shape is not None]
    received = iter(exchange(sends, receives, config, group))
    from_next = next(received) if recv_next is not None else None
    from_prev = next(received) if recv_prev is not None else None
    return from_prev, from_next


def recv_forward(tensor_shape: Shape, config: ModelParallelConfig, is_first_stage: bool) -> Tensor | None:
    """Activations from the previous stage; None on the first."""
    return None if is_first_stage else _with_neighbours(config, recv_prev=tensor_shape)[0]


def recv_backward(tensor_shape: Shape, config: ModelParallelConfig, is_last_stage: bool) -> Tensor | None:
    """Gradients from the next stage; None on the last."""
    return None if is_last_stage else _with_neighbours(config, recv_next=tensor_shape)[1]


def send_forward(output_tensor: Tensor, config: ModelParallelConfig, is_last_stage: bool) -> None:
    """Activations to the next stage; nothing on the last."""
    if not is_last_stage:
        _with_neighbours(config, send_next=output_tensor)


def send_backward(input_tensor_grad: Tensor, config: ModelParallelConfig, is_first_stage: bool) -> None:
    """Gradients to the previous stage; nothing on the first."""
    if not is_first_stage:
        _with_neighbours(config, send_prev=input_tensor_grad)


def send_forward_recv_backward(
    output_tensor: Tensor, tensor_shape: Shape, config: ModelParallelConfig, is_last_stage: bool
) -> Tensor | None:
    """Activations to the next stage, gradients from it; None on the last."""
    return None if is_last_stage else _with_neighbours(config, send_next=output_tensor, recv_next=tensor_shape)[1]


def send_backward_recv_forward(
    input_tensor_grad: Tensor, tensor_shape: Shape, config: ModelParallelConfig, is_first_stage: bool
) -> Tensor | None:
    """Gradients to the previous stage, activations from it; None on the first."""
    return None if is_first_stage else _with_neighbours(config, send_prev=input_tensor_grad, recv_prev=tensor_shape)[0]


def send_forward_recv_forward(
    output_tensor: Tensor, recv_prev: bool, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Activations to the next stage and, if `recv_prev`, from the previous one."""
    return _with_neighbours(config, send_next=output_tensor, recv_prev=tensor_shape if recv_prev else None)[0]


def send_backward_recv_backward(
    input_tensor_grad: Tensor, recv_next: bool, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Gradients to the previous stage and, if `recv_next`, from the next one."""
    return _with_neighbours(config, send_prev=input_tensor_grad, recv_next=tensor_shape if recv_next else None)[1]


def send_forward_backward_recv_forward_backward(
    output_tensor: Tensor,
    input_tensor_grad: Tensor,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Both ways with both neighbours: (activations, gradients) received."""
    return _with_neighbours(
        config,
        send_next=output_tensor,
        send_prev=input_tensor_grad,
        recv_next=tensor_shape if recv_next else None,
        recv_prev=tensor_shape if recv_prev else None,
    )
