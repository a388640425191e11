"""Isolated documents: the packed path of SDPA, which knows borders only, equals the explicit mask, in any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from tests.functional_tests.program import TINY, pretrain_gpt, train_rows

EOD = 60  # of a NullTokenizer with 60 words
RESETS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Short documents, several to a sample, each ending in the end-of-document token."""
    prefix = str(tmp_path_factory.mktemp("data") / "documents")
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
    for _ in range(200):
        tokens = [*random.integers(0, 60, random.integers(1, 40)).tolist(), EOD]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(get_idx_path(prefix))
    return prefix


def losses(tmp_path: Path, documents: str, world_size: int, flags: str) -> list[float]:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    data = [word for word in TINY if word != "--mock-data"] + ["--data-path", documents, "--split", "1,0,0"]
    exact = f"--train-iters 4 --attention-dropout 0 --hidden-dropout 0 --metrics-jsonl {path}"
    pretrain_gpt(world_size, [*data, *exact.split(), *flags.split()], tiny=False)
    return [row["lm loss"] for row in train_rows(path)]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, ""),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (4, "--pipeline-model-parallel-size 4"),
        (2, "--use-distributed-optimizer"),
    ],
)
def test_borders_do_what_the_mask_does(world_size: int, layout: str, documents: str, tmp_path: Path) -> None:
    masked = losses(tmp_path, documents, 1, f"{RESETS} --attention-backend unfused")
    packed = losses(tmp_path, documents, world_size, f"{RESETS} {layout}")
    assert packed == pytest.approx(masked, rel=1e-5)


def test_isolation_makes_a_difference(documents: str, tmp_path: Path) -> None:
    isolated = losses(tmp_path, documents, 1, RESETS)
    mixed = losses(tmp_path, documents, 1, "")
    assert all(abs(a - b) > 1e-4 for a, b in zip(isolated, mixed))


def test_loss_per_token_with_uneven_tokens(documents: str, tmp_path: Path) -> None:
    """Microbatches and ranks count unlike many tokens; with --calculate-per-token-loss each weighs the same."""
    flags = "--eod-mask-loss --calculate-per-token-loss"
    one = losses(tmp_path, documents, 1, f"{flags} --micro-batch-size 4")
    assert losses(tmp_path, documents, 1, flags) == pytest.approx(one, rel=1e-5)
    assert losses(tmp_path, documents, 4, flags) == pytest.approx(one, rel=1e-5)
    assert losses(tmp_path, documents, 2, f"{flags} --pipeline-model-parallel-size 2") == pytest.approx(one, rel=1e-5)
