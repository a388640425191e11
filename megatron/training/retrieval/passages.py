"""What can be retrieved: the blocks of a data set, or the passages of a table. s sequence."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy

from megatron.core.datasets.ict_dataset import ICTDataset, framed
from megatron.training.settings import ConfigurationError, refuse_unless

COLUMNS = ("doc_id", "text", "title")


class Passages(Protocol):
    """Texts under ids."""

    @property
    def ids(self) -> Sequence[int]:
        """Of all of them, in order."""
        ...

    def tokens(self, place: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(tokens, mask with 1 on real ones) of the passage at a place, [s] int64 each."""
        ...


class Blocks:
    """The blocks of a data set, each once and whole; a block's id is its number."""

    def __init__(self, dataset: ICTDataset) -> None:
        self.dataset, self.rows = dataset, dataset.blocks()
        self.ids = range(len(self.rows))

    def tokens(self, place: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        return self.dataset.whole_block(self.rows[place])


@dataclass(frozen=True)
class Passage:
    """A row of a table of evidence."""

    doc_id: int
    text: str
    title: str


@dataclass(frozen=True)
class Evidence:
    """The passages of a table, read as `[CLS] title [SEP] text [SEP]` of at most `length` tokens."""

    passages: Sequence[Passage]
    tokenizer: Any
    length: int

    @property
    def ids(self) -> Sequence[int]:
        return [passage.doc_id for passage in self.passages]

    def tokens(self, place: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        passage, tokenizer = self.passages[place], self.tokenizer
        return framed(tokenizer, self.length, tokenizer.tokenize(passage.title), tokenizer.tokenize(passage.text))


def read_evidence(path: Path, share: float = 1.0, seed: int = 0) -> list[Passage]:
    """The passages of a file of tab-separated columns doc_id, text and title, below a line with these names.

    Args:
        share: keep so many of them, drawn by `seed`.

    Raises:
        ConfigurationError: the file is missing or something else.
    """
    where = f"--evidence-data-path {path}"
    refuse_unless(path.is_file(), f"{where}: there is no such file")
    found, seen = [], set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        header = next(rows, [])
        refuse_unless(
            tuple(header[:3]) == COLUMNS, f"{where}: columns {', '.join(COLUMNS)} are expected, found {header[:3]}"
        )
        for number, row in enumerate(rows, 2):
            passage = _passage(row, f"{where}, line {number}")
            refuse_unless(passage.doc_id not in seen, f"{where}, line {number}: doc_id {passage.doc_id} is there twice")
            seen.add(passage.doc_id)
            found.append(passage)
    refuse_unless(found, f"{where}: there are no passages in it")
    if share == 1.0:
        return found
    kept = numpy.random.RandomState(seed).permutation(len(found))[: max(1, int(share * len(found)))]
    return [found[place] for place in sorted(kept)]


def _passage(row: list[str], where: str) -> Passage:
    refuse_unless(len(row) >= 3, f"{where}: three columns are expected, found {len(row)}")
    try:
        return Passage(int(row[0]), row[1], row[2])
    except ValueError:
        raise ConfigurationError(f"{where}: doc_id is a number, found {row[0]!r}") from None
