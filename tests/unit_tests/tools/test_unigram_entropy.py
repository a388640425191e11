"""Entropy of token frequencies."""

import math
import subprocess
import sys
from pathlib import Path

import numpy
import torch

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

ROOT = Path(__file__).resolve().parents[3]


def write_dataset(prefix: Path, sequences: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for sequence in sequences:
        builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def unigram_entropy(prefix: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/unigram_entropy.py"), "--data-path", str(prefix)]
    return subprocess.run(command, capture_output=True, text=True)


def test_entropy_is_that_of_the_frequencies(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [[7, 7], [0, 7, 300], [0, 7]])
    result = unigram_entropy(tmp_path / "data")
    expected = -(4 / 7 * math.log(4 / 7) + 2 / 7 * math.log(2 / 7) + 1 / 7 * math.log(1 / 7))
    assert f"unigram entropy: {expected:.4f} nats per token" in result.stdout
    assert "7 tokens, 3 different ones" in result.stdout


def test_a_missing_dataset_is_one_clear_error(tmp_path: Path) -> None:
    result = unigram_entropy(tmp_path / "nothing")
    assert result.returncode != 0
    assert "no file" in result.stderr
    assert "Traceback" not in result.stderr
