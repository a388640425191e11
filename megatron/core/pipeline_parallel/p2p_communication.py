"""Tensors between neighbouring pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_transport import InFlight, Receive, Send, Shape, post
from megatron.core.process_groups_config import default_process_groups

WaitHandles = dict[str, Any]
"""What waits for each transfer in flight (`handle.wait()`), by `send_next`, `recv_prev`, ..."""


def _pp_group() -> ProcessGroup:
    group = default_process_groups().pp
    assert group is not None
    return group


@dataclass(frozen=True)
class _Ring:
    """Transfers with the neighbours of this stage; the last stage's next is the first."""

    send_next: Tensor | None = None
    send_prev: Tensor | None = None
    recv_next: Shape | None = None
    recv_prev: Shape | None = None

    def post(self, config: ModelParallelConfig) -> dict[str, InFlight]:
        """Start them; what is in flight by the names above.

        Neighbours have opposite orders, so that each send stands where the other side has its receive.
        """
        group = _pp_group()
        after, before = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
        names = ["send_next", "recv_prev", "send_prev", "recv_next"]
        if group.rank() % 2:
            names = ["recv_prev", "send_next", "recv_next", "send_prev"]
        names = [name for name in names if getattr(self, name) is not None]
        kinds: dict[str, Callable[..., Send | Receive]] = {"send": Send, "recv": Receive}
        peers = {"next": after, "prev": before}
        transfers = [kinds[name[:4]](getattr(self, name), peers[name[5:]]) for name in names]
        return dict(zip(names, post(transfers, config, group)))


def _run(ring: _Ring, config: ModelParallelConfig) -> tuple[Tensor | None, Tensor | None]:
    """(received from the previous stage, received from the next stage), once all transfers are through."""
    tensors = {name: flight.wait() for name, flight in ring.post(config).items()}
    return tensors.get("recv_prev"), tensors.get("recv_next")


def _start(ring: _Ring, config: ModelParallelConfig, wanted: str) -> tuple[Tensor | None, WaitHandles]:
    """(the buffer of the receive `wanted`, not to be read before its handle's `wait`; the handles)."""
    flights = ring.post(config)
    return flights[wanted].tensor if wanted in flights else None, dict(flights)


def recv_forward(tensor_shape: Shape, config: ModelParallelConfig, is_first_stage: bool) -> Tensor | None:
    """Activations from the previous stage; None on the first."""
    return None if is_first_stage else _run(_Ring(recv_prev=tensor_shape), config)[0]


def recv_backward(tensor_shape: Shape, config: ModelParallelConfig, is_last_stage: bool) -> Tensor | None:
    """Gradients from the next stage; None on the last."""
    return None if is_last_stage else _run(_Ring(recv_next=tensor_shape), config)[1]


def send_forward(output_tensor: Tensor, config: ModelParallelConfig, is_last_stage: bool) -> None:
    """Activations to the next stage; nothing on the last."""
    if not is_last_stage:
        _run(_Ring(send_next=output_tensor), config)


def send_backward(input_tensor_grad: Tensor, config: ModelParallelConfig, is_first_stage: bool) -> None:
    """Gradients to the previous stage; nothing on the first."""
    if not is_first_stage:
        _run(_Ring(send_prev=input_tensor_grad), config)


def send_forward_recv_backward(
    output_tensor: Tensor, tensor_shape: Shape, config: ModelParallelConfig, is_last_stage: bool
) -> Tensor | None:
    """Activations to the next stage, gradients from it; None on the last."""
    return None if is_last_stage else _run(_Ring(send_next=output_tensor, recv_next=tensor_shape), config)[1]


def send_backward_recv_forward(
    input_tensor_grad: Tensor, tensor_shape: Shape, config: ModelParallelConfig, is_first_stage: bool
) -> Tensor | None:
    """Gradients to the previous stage, activations from it; None on the first."""
    return None if is_first_stage else _run(_Ring(send_prev=input_tensor_grad, recv_prev=tensor_shape), config)[0]


def send_forward_recv_forward(
    output_tensor: Tensor | None,
    recv_prev: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Any:
    """Activations to the next stage and, if `recv_prev`, from the previous one.

    With `overlap_p2p_comm` nothing is waited for: (the buffer that is being filled, its `WaitHandles`).
    """
    ring = _Ring(send_next=output_tensor, recv_prev=tensor_shape if recv_prev else None)
    return _start(ring, config, "recv_prev") if overlap_p2p_comm else _run(ring, config)[0]


def send_backward_recv_backward(
    input_tensor_grad: Tensor | None,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Any:
    """Gradients to the previous stage and, if `recv_next`, from the next one; overlapped as above."""
    ring = _Ring(send_prev=input_tensor_grad, recv_next=tensor_shape if recv_next else None)
    return _start(ring, config, "recv_next") if overlap_p2p_comm else _run(ring, config)[1]


def send_forward_backward_recv_forward_backward(
    output_tensor: Tensor | None,
    input_tensor_grad: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Both ways with both neighbours: (activations, gradients) received."""
    ring = _Ring(
        send_next=output_tensor,
        send_prev=input_tensor_grad,
        recv_next=tensor_shape if recv_next else None,
        recv_prev=tensor_shape if recv_prev else None,
    )
    return _run(ring, config)
