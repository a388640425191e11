"""How likely a GPT finds given texts, under any layout. b texts of a batch, s tokens, v vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.device import current_device
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.vocab_argmax import vocab_parallel_argmax
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
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


@dataclass(frozen=True)
class ScoredText:
    """Tokens of which the last ones are to be predicted, each from all before it."""

    tokens: Sequence[int]
    first: int
    """Index of the first token that is predicted, at least 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.tokens):
            raise ValueError(
                f"of {len(self.tokens)} tokens those from {self.first} on cannot be predicted: at least one must come "
                "before them, and one is needed"
            )


@dataclass(frozen=True)
class Score:
    """What the model thinks of the predicted tokens of a text."""

    log_likelihood: float
    """Sum over the tokens, in nats."""
    is_greedy: bool
    """Each of them is the model's first choice."""


def score(
    model: list[nn.Module],
    texts: Sequence[ScoredText],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda texts_done: None,
) -> list[Score]:
    """The score of each text, the same on every rank. All ranks call this with the same texts.

    Texts that begin alike are read once, see `Row`. Rows are run longest first, so that those in a batch are about
    equally long; what pads them on the right is invisible to them because attention is causal. Communicates: as a
    forward pass, and one all-reduce over all ranks at the end.

    Args:
        model: the chunks of this rank, with or without their wrappers.
        batch_size: rows that a data parallel rank runs at once.
        on_progress: called now and then with the number of texts that are done.
    """
    rows = sorted(rows_of(texts), key=lambda row: -len(row.tokens))
    totals = zeros(len(texts) + 1, 2)  # loss and wrong first choices of each text; the last row is for empty places
    with evaluating(model):
        for share in shares(len(rows), batch_size, batches_in_flight()):
            length = round_up(len(rows[share.begin].tokens), length_multiple(model))
            batches = [
                collate([rows[share.begin if row is None else row] for row in numbers], length, len(texts), numbers)
                for numbers in share.batches
            ]
            for found in run_batches(
                model,
                batches,
                _compute,
                lambda logits, batch: _read(unwrap_model(model[-1]), logits, batch),
                seq_length=length,
                num_sequences=len(share.batches[0]),
            ):
                for of_texts, values in found:
                    totals.index_add_(0, of_texts, values)
            on_progress(sum(len(row.targets) for row in rows[: share.end]))
    return [Score(-loss, misses == 0) for loss, misses in share_rows(totals)[:-1].tolist()]


@dataclass(frozen=True)
class Row:
    """What a model reads to score one or several texts: of these, each one's tokens but the last begin the longest's.

    Under causal attention what the model predicts after some tokens does not depend on what follows them. So the
    choices of a question that are one token each take one row, and not one each.
    """

    tokens: Sequence[int]
    targets: list[tuple[int, int, Sequence[int]]]
    """For each text its number, the place after which its first label comes, and its labels."""


def rows_of(texts: Sequence[ScoredText]) -> list[Row]:
    """The rows that score all texts.

    >>> texts = [ScoredText([5, 6, 7], 2), ScoredText([5, 6, 8], 2), ScoredText([9, 6], 1)]
    >>> [(row.tokens, [number for number, _, _ in row.targets]) for row in rows_of(texts)]
    [((9,), [2]), ((5, 6), [1, 0])]
    """
    read = [tuple(text.tokens[:-1]) for text in texts]
    rows: list[Row] = []
    for number in sorted(range(len(texts)), key=read.__getitem__, reverse=True):  # a beginning comes after the whole
        tokens, text = read[number], texts[number]
        if not rows or rows[-1].tokens[: len(tokens)] != tokens:
            rows.append(Row(tokens, []))
        rows[-1].targets.append((number, text.first - 1, text.tokens[text.first :]))
    return rows


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def collate(rows: Sequence[Row], length: int, nobody: int, numbers: Sequence[int | None]) -> Batch:
    """This context parallel rank's part of a batch, [b, length/cp] each: `tokens`, `position_ids`, `labels0`, `texts0`
    (whose label it is, -1 where there is none), and further layers of both where texts share a place.

    Args:
        nobody: whose the labels are in an empty place, where `numbers` has None.
    """
    batch = {"tokens": torch.zeros(len(rows), length, dtype=torch.int64)}
    batch["position_ids"] = torch.arange(length).expand(len(rows), length)
    for place, row in enumerate(rows):
        batch["tokens"][place, : len(row.tokens)] = torch.as_tensor(row.tokens, dtype=torch.int64)
        taken = [0] * length  # layers in use at each position
        for text, first, labels in row.targets:
            layer = max(taken[first : first + len(labels)])
            for name, empty in ((f"labels{layer}", 0), (f"texts{layer}", -1)):
                if name not in batch:
                    batch[name] = torch.full((len(rows), length), empty, dtype=torch.int64)
            span = slice(first, first + len(labels))
            batch[f"labels{layer}"][place, span] = torch.as_tensor(labels, dtype=torch.int64)
            batch[f"texts{layer}"][place, span] = nobody if numbers[place] is None else text
            taken[span] = [layer + 1] * len(labels)
    on_device = {name: tensor.to(current_device()) for name, tensor in batch.items()}
    return get_batch_on_this_cp_rank(on_device, get_context_parallel_group())


def _layers(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(labels, texts) of each layer."""
    return [(batch[name.replace("texts", "labels")], batch[name]) for name in batch if name.startswith("texts")]


def _wanted(batch: Batch) -> Tensor:
    """[b, s/cp] bool: the places after which something is predicted."""
    return torch.stack([texts for _, texts in _layers(batch)]).amax(0) >= 0


def _compute(chunk: nn.Module, batch: Batch) -> Tensor:
    return chunk(batch["tokens"], batch["position_ids"], None, output_positions=_wanted(batch))


def _read(model: Any, logits: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """For each layer of targets, (number of the text [n], loss and whether another token is more likely [n, 2])."""
    wanted, found = _wanted(batch), []
    first_choice = vocab_parallel_argmax(logits, model.model_comm_pgs.tp, model.true_vocab_size)[0]
    for labels, texts in _layers(batch):
        own = (texts[wanted] >= 0).nonzero().squeeze(1)  # of the logits
        labels, texts = labels[wanted][own], texts[wanted][own]
        chosen = logits[0] if len(own) == logits.size(1) else logits[0].index_select(0, own)
        losses = model.compute_language_model_loss(labels[None], chosen[:, None].contiguous())[0]
        found.append((texts, torch.stack([losses, first_choice[own] != labels]).double().T))
    return found
