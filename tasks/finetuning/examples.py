"""What a BERT is finetuned on: labelled texts, and how they become tokens. s sequence, c choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

NO_LABEL = -1
"""Label of a place in a batch that is left empty, or of a text whose class is not known."""


@dataclass(frozen=True)
class Example:
    """A text to classify, or several among which to choose; each is a pair of texts."""

    uid: int
    pairs: tuple[tuple[str, str], ...]
    label: int = NO_LABEL


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a file or folder, all with a label or none."""

    name: str
    examples: list[Example]

    @property
    def has_labels(self) -> bool:
        return self.examples[0].label != NO_LABEL


@dataclass(frozen=True)
class PairEncoder:
    """Pairs of texts as a BERT reads them, `[CLS] first [SEP] second [SEP]`, padded to `length` tokens.

    What is too long loses its end, before the last [SEP]; the first text has at most `most_first` tokens.
    """

    tokenizer: Any
    length: int
    most_first: int | None = None

    def __call__(self, example: Example) -> dict[str, Tensor]:
        """int64: `text`, `types` and `padding_mask` [s], or [c, s] with several pairs, `label` and `uid` []."""
        rows = [self._row(*pair) for pair in example.pairs]
        columns = dict(zip(("text", "types", "padding_mask"), torch.tensor(rows).transpose(0, 1)))
        if len(rows) == 1:
            columns = {name: column[0] for name, column in columns.items()}
        return columns | {"label": torch.tensor(example.label), "uid": torch.tensor(example.uid)}

    def _row(self, first: str, second: str) -> tuple[list[int], list[int], list[int]]:
        tokenizer = self.tokenizer
        head = [tokenizer.cls, *list(tokenizer.tokenize(first))[: self.most_first], tokenizer.sep]
        tail = list(tokenizer.tokenize(second))
        tokens = [*head, *tail][: self.length - 1] + [tokenizer.sep]
        types = [0] * min(len(head), self.length) + [1] * (len(tokens) - min(len(head), self.length))
        padding = self.length - len(tokens)
        return tokens + [tokenizer.pad] * padding, types + [0] * padding, [1] * len(tokens) + [0] * padding


class Epochs(Dataset):
    """All examples in another order in each epoch; each epoch ends with a whole batch.

    Samples depend on their index and `seed` alone. The examples that do not fill a batch are left out of the epoch, or
    with `keep_last` the batch is filled up with places that have no label.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encode: PairEncoder,
        *,
        epochs: int,
        batch_size: int,
        keep_last: bool,
        seed: int,
    ) -> None:
        self.examples, self.encode, self.seed = examples, encode, seed
        self.per_epoch = batches_per_epoch(len(examples), batch_size, keep_last) * batch_size
        self.num_samples = self.per_epoch * epochs
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        order = self._order[1]
        if place < len(order):
            return self.encode(self.examples[order[place]])
        return self.encode(self.examples[order[0]]) | {"label": torch.tensor(NO_LABEL)}


class Repeated(Dataset):
    """The examples in order, again and again, up to `num_samples`."""

    def __init__(self, examples: Sequence[Example], encode: PairEncoder, num_samples: int) -> None:
        self.examples, self.encode, self.num_samples = examples, encode, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.encode(self.examples[index % len(self.examples)])


def batches_per_epoch(num_examples: int, batch_size: int, keep_last: bool) -> int:
    """Steps in which the examples are seen once."""
    return -(-num_examples // batch_size) if keep_last else num_examples // batch_size
