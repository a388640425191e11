"""Running a model without training it, under any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import device, parallel_state
from megatron.core.collectives import all_reduce
from megatron.core.pipeline_parallel import get_forward_backward_func

Batch = dict[str, Tensor]


@contextmanager
def evaluating(model: list[nn.Module]) -> Iterator[None]:
    """Inside, the model neither drops anything out nor records gradients."""
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(model, was_training):
            chunk.train(training)


def run_batches(
    model: list[nn.Module],
    batches: Sequence[Batch],
    compute: Callable[[nn.Module, Batch], Tensor],
    read: Callable[[Tensor, Batch], Any],
    *,
    seq_length: int,
    num_sequences: int,
) -> list[Any]:
    """What `read` makes of the output of each batch, on the last stage; nothing elsewhere. All ranks of the model call
    this with equal batches.

    Args:
        batches: as many on every data parallel rank, equal in shape.
        compute: (model chunk, batch) -> output of this stage.
        seq_length, num_sequences: tokens and sequences of a batch, as they cross from stage to stage.
    """

    def forward_step(data_iterator: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(data_iterator)
        return compute(chunk, batch), lambda output, non_loss_data=True: read(output, batch)

    iterators = [iter(batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=num_sequences,
        forward_only=True,
        collect_non_loss_data=True,
    )


@dataclass(frozen=True)
class Share:
    """The rows that a data parallel rank runs in one go."""

    batches: list[list[int | None]]
    """Numbers of rows, None where a place is empty; equal in number and length on every data parallel rank."""
    begin: int
    end: int
    """All ranks together run rows `begin` to `end` - 1."""


def shares(num_rows: int, batch_size: int, num_batches: int) -> Iterator[Share]:
    """This rank's part of rows 0, 1, ... in goes of at most `num_batches` batches of at most `batch_size` rows.

    Args:
        num_batches: rounded up to what an interleaved pipeline can run.
    """
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    is_interleaved = bool(parallel_state.get_virtual_pipeline_model_parallel_world_size())
    unit = parallel_state.get_pipeline_model_parallel_world_size() if is_interleaved else 1
    most_rows = batch_size * dp_size * -(-num_batches // unit) * unit
    for begin in range(0, num_rows, most_rows):
        end = min(begin + most_rows, num_rows)
        size = min(batch_size, -(-(end - begin) // dp_size))
        count = -(-(end - begin) // (size * dp_size * unit)) * unit
        places = [*range(begin, end), *[None] * (count * size * dp_size - (end - begin))]
        starts = [(batch * dp_size + dp_rank) * size for batch in range(count)]
        yield Share([places[start : start + size] for start in starts], begin, end)


def batches_in_flight() -> int:
    """How many batches to run in one go: enough to keep all stages busy most of the time."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return 1 if stages == 1 else 4 * stages


def share_rows(own: Tensor) -> Tensor:
    """`own` [rows, ...] summed over all ranks, in place, where each rank's last stage has filled in what it knows and
    left 0 elsewhere. Communicates: all-reduce over the world.

    Tensor parallel ranks all know the same: only the first of them counts.
    """
    if parallel_state.get_tensor_model_parallel_rank():
        own.zero_()
    all_reduce(own, what="scores")
    return own


def zeros(*shape: int) -> Tensor:
    """fp64, for sums over many rows."""
    where = device.current_device()
    return torch.zeros(shape, dtype=torch.float64, device=where)
