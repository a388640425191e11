"""Device tensors that wait in host memory. On CUDA copies run beside the computation, from and to pinned memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core import device


class HostStore(Protocol):
    """Where tensors are put away. `fetch` starts to bring one back, `arrive` waits until it is there."""

    def put(self, tensor: Tensor) -> Any:
        """Start to copy `tensor`; what brings the copy back."""

    def fetch(self, ticket: Any, into: Tensor | None = None) -> Any:
        """Start to bring a tensor back, into new memory or `into`."""

    def arrive(self, fetched: Any) -> Tensor:
        """The tensor, once computation may read it."""


def _empty_beside(tensor: Tensor, **options: Any) -> Tensor:
    """Memory for the elements of `tensor`, in their order; what was not dense becomes so."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format, **options)


class CopyStore:
    """Plain copies: the store of devices whose memory is the host's."""

    def put(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return _empty_beside(tensor, device="cpu").copy_(tensor)

    def fetch(self, ticket: Tensor, into: Tensor | None = None) -> Tensor:
        """A copy on the device, made at once."""
        if into is None:
            into = _empty_beside(ticket, device=device.current_device())
        return into.copy_(ticket)

    def arrive(self, fetched: Tensor) -> Tensor:
        """What was fetched."""
        return fetched


@dataclass(frozen=True)
class _Copying:
    """A tensor that is being copied to where it is, until `event`."""

    tensor: Tensor
    event: Any


class CudaStore:
    """Copies on streams of their own, one for each direction; the host side is pinned.

    Nothing waits on the host: the streams wait for each other. Never run so far for want of a GPU.
    """

    def __init__(self) -> None:
        self.out_stream, self.in_stream = torch.cuda.Stream(), torch.cuda.Stream()

    def put(self, tensor: Tensor) -> _Copying:
        """Start the copy behind the kernels that compute `tensor`; the caller may drop `tensor` at once."""
        self.out_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.out_stream):
            host = _empty_beside(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.out_stream)  # its memory is not reused before the copy is done
        return _Copying(host, self.out_stream.record_event())

    def fetch(self, ticket: _Copying, into: Tensor | None = None) -> _Copying:
        """Start the copy back, beside whatever computes now."""
        if into is None:
            into = _empty_beside(ticket.tensor, device=device.current_device(), pin_memory=False)
        self.in_stream.wait_stream(torch.cuda.current_stream())  # which `into` was allocated on
        self.in_stream.wait_event(ticket.event)
        with torch.cuda.stream(self.in_stream):
            into.copy_(ticket.tensor, non_blocking=True)
        into.record_stream(self.in_stream)
        return _Copying(into, self.in_stream.record_event())

    def arrive(self, fetched: _Copying) -> Tensor:
        """Make computation wait for the copy."""
        torch.cuda.current_stream().wait_event(fetched.event)
        return fetched.tensor


def host_store() -> HostStore:
    """The store that fits the device."""
    return CudaStore() if device.device_type() == "cuda" else CopyStore()
