"""Questions with passages that answer them and passages that do not: the files of DPR (Karpukhin et al.,
arXiv:2004.04906), and how they become tokens. s sequence, n negatives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron.core.datasets.ict_dataset import framed
from megatron.training.settings import ConfigurationError, refuse_unless
from megatron.training.utils import warn_rank_0

POSITIVE, HARD, OTHER = "positive_ctxs", "hard_negative_ctxs", "negative_ctxs"


@dataclass(frozen=True)
class Text:
    """A passage."""

    title: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A question, a passage that answers it, and passages that do not: those that look as if they did, and others."""

    question: str
    positive: Text
    hard: tuple[Text, ...] = ()
    other: tuple[Text, ...] = ()

    def negatives(self, number: int) -> list[Text]:
        """So many of its negatives, the hard ones first; one comes again where it has fewer, and is empty where it has
        none."""
        return list(islice(cycle((*self.hard, *self.other) or (Text("", ""),)), number))


def read_pairs(path: Path, where: str) -> list[Pair]:
    """The questions of a file: a JSON list of objects with `question`, `positive_ctxs`, and perhaps
    `hard_negative_ctxs` and `negative_ctxs`, lists of objects with `title` and `text`.

    The first positive passage is taken. Questions without one, of which the published files have a few, are left out.

    Raises:
        ConfigurationError: the file is missing or something else.
    """
    refuse_unless(path.is_file(), f"{where}: a file is expected, not a folder")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of which a UnicodeDecodeError is one
        raise ConfigurationError(f"{where}: no JSON ({error})") from None
    refuse_unless(isinstance(rows, list) and rows, f"{where}: a list of questions is expected, as in the files of DPR")
    found = [_pair(row, f"{where}, question {number}") for number, row in enumerate(rows, 1)]
    pairs = [pair for pair in found if pair is not None]
    refuse_unless(pairs, f"{where}: none of its questions has a passage under {POSITIVE}")
    if len(pairs) < len(rows):
        warn_rank_0(f"{where}: {len(rows) - len(pairs)} of {len(rows)} questions have no {POSITIVE} and are left out")
    return pairs


def _pair(row: Any, where: str) -> Pair | None:
    missing = [name for name in ("question", POSITIVE) if not isinstance(row, dict) or name not in row]
    refuse_unless(not missing, f"{where}: {', '.join(missing)} missing; a question and {POSITIVE} are expected")
    positive, hard, other = (_texts(row.get(name) or (), f"{where}, {name}") for name in (POSITIVE, HARD, OTHER))
    return Pair(str(row["question"]), positive[0], hard, other) if positive else None


def _texts(passages: Any, where: str) -> tuple[Text, ...]:
    whole = isinstance(passages, Sequence) and all(isinstance(one, dict) and "text" in one for one in passages)
    refuse_unless(whole, f"{where}: a list of passages with title and text is expected")
    return tuple(Text(str(one.get("title") or ""), str(one["text"])) for one in passages)


@dataclass(frozen=True)
class QuestionEncoder:
    """Questions `[CLS] question [SEP]` and their passages `[CLS] title [SEP] text [SEP]`, of `length` tokens each."""

    tokenizer: Any
    length: int
    negatives: int = 0
    """Of each question."""

    def __call__(self, pair: Pair) -> dict[str, Tensor]:
        """int64: `query_tokens`, `query_pad_mask` [s]; `context_tokens`, `context_pad_mask` [1 + n, s], the right one
        first. Masks are 1 on real tokens."""
        query, query_mask = self.question(pair.question)
        passages = [self.passage(text) for text in (pair.positive, *pair.negatives(self.negatives))]
        tokens, masks = (torch.from_numpy(numpy.stack(column)) for column in zip(*passages))
        return {
            "query_tokens": torch.from_numpy(query),
            "query_pad_mask": torch.from_numpy(query_mask),
            "context_tokens": tokens,
            "context_pad_mask": masks,
        }

    def question(self, text: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(tokens, mask) [s]."""
        return framed(self.tokenizer, self.length, self.tokenizer.tokenize(text))

    def passage(self, text: Text) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(tokens, mask) [s]."""
        return framed(
            self.tokenizer, self.length, self.tokenizer.tokenize(text.title), self.tokenizer.tokenize(text.text)
        )
