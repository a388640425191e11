"""What a pipeline stage does, as values: computations of microbatches, and transfers that are posted and waited for.

P ranks, V model chunks on each, M microbatches. A *virtual stage* is one chunk of one rank, counted in the order in
which activations pass (`stage_placement`). Nothing here needs a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What is computed of a microbatch on a chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs and weights."""
    INPUT_GRAD = "I"
    """The part of backward that the stage before waits for."""
    WEIGHT_GRAD = "W"
    """The rest of it: gradients of the linear layers' weights (arXiv:2401.10241, section 2)."""


class Direction(Enum):
    """Activations travel forward, their gradients backward."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Compute:
    """One computation of one microbatch on one model chunk of the rank."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __repr__(self) -> str:
        return f"{self.kind.value}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


def Forward(microbatch: int, chunk: int = 0) -> Compute:
    """Forward of a microbatch."""
    return Compute(Kind.FORWARD, microbatch, chunk)


def Backward(microbatch: int, chunk: int = 0) -> Compute:
    """Whole backward of a microbatch."""
    return Compute(Kind.BACKWARD, microbatch, chunk)


def InputGrad(microbatch: int, chunk: int = 0) -> Compute:
    """Backward without the gradients of the linear layers' weights."""
    return Compute(Kind.INPUT_GRAD, microbatch, chunk)


def WeightGrad(microbatch: int, chunk: int = 0) -> Compute:
    """What `InputGrad` of the same microbatch left out."""
    return Compute(Kind.WEIGHT_GRAD, microbatch, chunk)


@dataclass(frozen=True)
class Transfer:
    """Send or receive what one microbatch leaves at the border between two virtual stages on different ranks."""

    is_send: bool
    direction: Direction
    microbatch: int
    peer: int
    """The other rank."""
    chunk: int = 0
    """This rank's chunk that made the tensor (send) or takes it (receive)."""
    stage: int = 0
    """The virtual stage that takes it; with direction and microbatch this names the message on both sides."""

    @property
    def message(self) -> tuple[Direction, int, int]:
        """What sender and receiver agree on."""
        return self.direction, self.microbatch, self.stage


@dataclass(frozen=True)
class Post:
    """Start these transfers together, in this order, and go on."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """Go on when these transfers, posted before, are done."""

    transfers: tuple[Transfer, ...]


Step = Compute | Post | Wait
Order = list[Compute]
"""What one rank computes, in order."""
