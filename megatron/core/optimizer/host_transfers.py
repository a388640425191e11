"""Gradients to the host, updated weights back: what an optimizer whose state lies in host memory moves.

On CUDA with `overlap` both go over a stream of their own, from and to pinned memory: while the host updates one piece,
the gradients of the next arrive and the weights of the last leave, and the device updates its own share. Where the
device is the CPU the copies are made all the same, into other memory, so that this path is tested there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

HOST = torch.device("cpu")


class OnHost(Protocol):
    """What is updated on the host."""

    weights: Tensor
    """[n] of the model, on the device."""

    def weights_follow(self, rounded: Tensor | None = None) -> None:
        """Write the rounded main weights into `rounded`, in host memory."""


@dataclass(eq=False)
class _Staging:
    """Host memory of a piece, kept from step to step."""

    grad: Tensor
    weights: Tensor
    arrived: Any = None
    """Event: the gradient is there."""
    left: Any = None
    """Event: the weights of the last step have been read."""


@dataclass
class HostTransfers:
    """Moves gradients and weights: `begin`, for each piece `grad_on_host` and `send_weights`, then `finish`."""

    overlap: bool
    pin_grads: bool
    pin_weights: bool
    _staging: dict[int, _Staging] = field(default_factory=dict)
    _stream: Any = None

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros in host memory, for state."""
        return torch.zeros(numel, dtype=dtype, device=HOST)

    def begin(self, pieces: Sequence[tuple[OnHost, Tensor]]) -> None:
        """Let the gradients of all pieces set off, in order; without overlap they are fetched one by one instead."""
        if not (self.overlap and pieces and pieces[0][1].is_cuda):
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(pieces[0][1].device)
        self._stream.wait_stream(torch.cuda.current_stream())  # gradients are clipped, weights no longer read
        with torch.cuda.stream(self._stream):
            for piece, grad in pieces:
                staging = self._staging_of(piece, grad)
                staging.grad.copy_(grad, non_blocking=True)
                staging.arrived = torch.cuda.Event()
                staging.arrived.record()

    def grad_on_host(self, piece: OnHost, grad: Tensor) -> Tensor:
        """The gradient in host memory, once it is there."""
        staging = self._staging_of(piece, grad)
        if staging.arrived is None:
            staging.grad.copy_(grad)
        else:
            staging.arrived.synchronize()
            staging.arrived = None
        return staging.grad

    def send_weights(self, piece: OnHost) -> None:
        """Round the main weights on the host, in the type of the model's, and let them set off."""
        staging = self._staging[id(piece)]
        if staging.left is not None:
            staging.left.synchronize()
            staging.left = None
        piece.weights_follow(staging.weights)
        if self._stream is None:
            piece.weights.copy_(staging.weights)
            return
        with torch.cuda.stream(self._stream):
            piece.weights.copy_(staging.weights, non_blocking=True)
            staging.left = torch.cuda.Event()
            staging.left.record()

    def finish(self) -> None:
        """What the device does from now on sees the new weights."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _staging_of(self, piece: OnHost, grad: Tensor) -> _Staging:
        if id(piece) not in self._staging:
            weights = piece.weights
            self._staging[id(piece)] = _Staging(
                self._on_host(weights.numel(), grad.dtype, pin=self.pin_grads, of=grad),
                self._on_host(weights.numel(), weights.dtype, pin=self.pin_weights, of=weights),
            )
        return self._staging[id(piece)]

    @staticmethod
    def _on_host(numel: int, dtype: torch.dtype, *, pin: bool, of: Tensor) -> Tensor:
        """Only memory that a CUDA device reads or writes can be, and need be, pinned."""
        return torch.empty(numel, dtype=dtype, device=HOST, pin_memory=pin and of.is_cuda)
