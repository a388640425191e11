"""Weights, gradients and optimizer state take what the published table says, for each pair of types."""

from __future__ import annotations

import pytest

from benchmarks.memory_optimizer import ROWS, Row, bytes_per_parameter
from megatron.core import parallel_state
from tests.worker_pool import run_ranks

WIDTH = 256


def count(row: Row) -> float:
    parallel_state.initialize_model_parallel()
    return bytes_per_parameter(row, WIDTH)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bytes_per_parameter(row: Row) -> None:
    ranks = 2
    for found in run_ranks(ranks, count, row):
        assert found == pytest.approx(row.fixed + row.shared / ranks, rel=0.005)
