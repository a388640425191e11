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
from megatron.inference.text_generation import length_multiple


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

    Texts are run longest first, so that those in a batch are about equally long; what pads them on the right is
    invisible to them because attention is causal. Communicates: as a forward pass, and one all-reduce over all
    ranks at the end.

    Args:
        model: the chunks of this rank, with or without their wrappers.
        batch_size: texts that a data parallel rank runs at once.
        on_progress: called now and then with the number of texts that are done.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    ordered = [texts[i] for i in order]
    totals = zeros(len(texts) + 1, 2)  # loss and wrong first choices of each text; the last row is for empty places
    with evaluating(model):
        for share in shares(len(texts), batch_size, batches_in_flight()):
            length = round_up(len(ordered[share.begin].tokens) - 1, length_multiple(model))
            batches = [collate(rows, share.begin, ordered, length) for rows in share.batches]
            for rows, values in run_batches(
                model,
                batches,
                _compute,
                lambda logits, batch: _read(unwrap_model(model[-1]), logits, batch),
                seq_length=length,
                num_sequences=len(share.batches[0]),
            ):
                totals.index_add_(0, rows, values)
            on_progress(share.end)
    found = share_rows(totals)[:-1].tolist()
    scores = {i: Score(-loss, misses == 0) for i, (loss, misses) in zip(order, found)}
    return [scores[i] for i in range(len(texts))]


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def collate(rows: Sequence[int | None], filler: int, texts: Sequence[ScoredText], length: int) -> Batch:
    """This context parallel rank's part of a batch, [b, length/cp] each: `tokens`, `position_ids`, `labels`, `wanted`
    (is the label to be predicted?), and `rows`, the number of each position's text.

    An empty place is taken by text `filler`, under a number behind the last text's.
    """
    batch = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in ("tokens", "labels", "wanted", "rows")}
    for place, row in enumerate(rows):
        text = texts[filler if row is None else row]
        tokens = torch.as_tensor(text.tokens, dtype=torch.int64)
        batch["tokens"][place, : len(tokens) - 1] = tokens[:-1]
        batch["labels"][place, : len(tokens) - 1] = tokens[1:]
        batch["wanted"][place, text.first - 1 : len(tokens) - 1] = 1
        batch["rows"][place] = len(texts) if row is None else row
    batch["position_ids"] = torch.arange(length).expand(len(rows), length)
    on_device = {name: tensor.to(current_device()) for name, tensor in batch.items()}
    return get_batch_on_this_cp_rank(on_device, get_context_parallel_group())


def _compute(chunk: nn.Module, batch: Batch) -> Tensor:
    return chunk(batch["tokens"], batch["position_ids"], None, output_positions=batch["wanted"].bool())


def _read(model: Any, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(number of the text [n], loss and whether another token is more likely [n, 2]) of each predicted token."""
    wanted = batch["wanted"].bool()
    labels = batch["labels"][wanted][None]  # [1, n]
    first_choice = vocab_parallel_argmax(logits, model.model_comm_pgs.tp, model.true_vocab_size)
    losses = model.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
    return batch["rows"][wanted], torch.cat([losses, first_choice != labels]).double().T
