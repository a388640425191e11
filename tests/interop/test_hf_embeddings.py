"""Vectors of texts are the means of transformers' hidden states, in every layout."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.inference.embedding import embed
from tests.interop.hf_models import HIDDEN, LENGTH, VOCAB, make, start
from tests.worker_pool import run_ranks

LAYOUTS = {
    "one": [],
    "data parallel": [],
    "tensor and sequence parallel": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pipeline": ["--pipeline-model-parallel-size", "2"],
}


def rows() -> list[list[int]]:
    numbers = random.Random(2)
    return [[numbers.randrange(VOCAB) for _ in range(numbers.randint(3, LENGTH))] for _ in range(11)]


def vectors(flags: list[str], directory: Path) -> Tensor:
    from unittest import mock

    from megatron.training import capabilities

    with mock.patch.object(capabilities, "ARGUMENTS_OF_TOOLS", {}):  # stands for the program that reads the flag
        model = start(["--load", f"hf:{directory}", "--output-bert-embeddings", *flags], "bert")
    with pytest.raises(ValueError, match="text 1 is empty"):
        embed(model, [[1, 2, 3], [1, 2]], batch_size=1)
    return embed(model, rows(), batch_size=3)


def test_vectors(tmp_path: Path) -> None:
    theirs = make("bert", tmp_path).bert
    expected = torch.empty(len(rows()), HIDDEN)
    for row, vector in zip(rows(), expected):
        with torch.no_grad():
            vector.copy_(theirs(torch.tensor([row])).last_hidden_state[0, 1:-1].mean(0))
    for name, flags in LAYOUTS.items():
        for found in run_ranks(1 if name == "one" else 2, vectors, flags, tmp_path):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
