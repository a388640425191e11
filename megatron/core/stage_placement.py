"""Which pipeline rank holds which virtual stage: arithmetic only, no processes.

A model is cut into P x V virtual stages, which activations pass through in order. Each of the P pipeline ranks holds
V of them, its model chunks 0 .. V-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PlacementShape = Literal["loop", "v"]


class Holder(NamedTuple):
    """A chunk of a rank."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Placement:
    """How virtual stages lie on the ranks.

    "loop": stages 0 .. P-1 are chunk 0 of the ranks in order, P .. 2P-1 are chunk 1, and so on. "v": odd chunks
    run through the ranks backwards, so that with two chunks the first rank holds both ends of the model.

    >>> [Placement(2, 2).stage_of(rank, chunk) for rank in range(2) for chunk in range(2)]
    [0, 2, 1, 3]
    >>> [Placement(2, 2, "v").stage_of(rank, chunk) for rank in range(2) for chunk in range(2)]
    [0, 3, 1, 2]
    """

    num_ranks: int
    num_chunks: int = 1
    shape: PlacementShape = "loop"

    @property
    def num_stages(self) -> int:
        """Virtual stages in all."""
        return self.num_ranks * self.num_chunks

    def stage_of(self, rank: int, chunk: int = 0) -> int:
        """Place of a chunk in the order in which activations pass."""
        if self.shape == "v" and chunk % 2:
            rank = self.num_ranks - 1 - rank
        return chunk * self.num_ranks + rank

    def holder_of(self, stage: int) -> Holder:
        """Who holds a virtual stage."""
        chunk, rank = divmod(stage, self.num_ranks)
        return Holder(self.num_ranks - 1 - rank if self.shape == "v" and chunk % 2 else rank, chunk)

    @property
    def last_rank(self) -> int:
        """The rank that holds the end of the model, where the loss is."""
        return self.holder_of(self.num_stages - 1).rank


def placement_shape(pipeline_schedule: str) -> PlacementShape:
    """How a schedule wants the virtual stages to lie."""
    return "v" if pipeline_schedule == "zb-v" else "loop"


def placement_of(config: Any) -> Placement:
    """Which rank holds which virtual stage of a model with this `ModelParallelConfig`."""
    return Placement(
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size or 1,
        placement_shape(config.pipeline_schedule),
    )
