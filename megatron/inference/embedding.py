"""One vector for each text, by a BERT, under any layout. n texts, h hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron.core.device import current_device
from megatron.core.utils import get_model_config
from megatron.inference.forward_only import (
    Batch,
    batches_in_flight,
    evaluating,
    run_batches,
    share_rows,
    shares,
    zeros,
)
from megatron.inference.text_generation.generation import length_multiple


def embed(
    model: list[nn.Module],
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> Tensor:
    """[n, h] fp32 on every rank: the mean of the last hidden states of each row's tokens but the first and the last.

    All ranks call this with the same rows; data parallel ranks share them. Communicates: as a forward pass, and one
    all-reduce over all ranks at the end.

    Args:
        model: the chunks of this rank, of a `BertModel` with `return_embeddings`.
        rows: tokens with the marks of their begin and end, [CLS] and [SEP].
        batch_size: rows that a data parallel rank runs at once.

    Raises:
        ValueError: a row has nothing between its marks.
    """
    for number, row in enumerate(rows):
        if len(row) < 3:
            raise ValueError(f"text {number} is empty: it has no vector")
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    found = zeros(len(rows) + 1, get_model_config(model[0]).hidden_size)  # the last row is for empty places
    with evaluating(model):
        for share in shares(len(rows), batch_size, batches_in_flight()):
            length = -(-len(rows[order[share.begin]]) // length_multiple(model)) * length_multiple(model)
            numbers = [[len(rows) if place is None else order[place] for place in batch] for batch in share.batches]
            batches = [
                _collate([rows[order[share.begin] if n == len(rows) else n] for n in own], length) for own in numbers
            ]
            vectors = run_batches(
                model, batches, _compute, lambda output, _: output, seq_length=length, num_sequences=len(numbers[0])
            )
            for own, some in zip(numbers, vectors):
                found[own] = some.double()
            on_progress(share.end)
    return share_rows(found)[:-1].float()


def _collate(rows: Sequence[Sequence[int]], length: int) -> Batch:
    tokens, real = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], real[place, : len(row)] = torch.as_tensor(row), 1
    where = current_device()
    return {"tokens": tokens.to(where), "real": real.to(where), "types": torch.zeros_like(tokens).to(where)}


def _compute(chunk: nn.Module, batch: Batch) -> Tensor:
    return chunk(batch["tokens"], batch["real"], tokentype_ids=batch["types"])
