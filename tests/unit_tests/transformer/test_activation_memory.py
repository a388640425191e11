"""What a layer keeps for backward, counted, against the formulas of arXiv:2205.05198, table 2."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.memory_activations import Shape, measure
from megatron.core import parallel_state
from tests.worker_pool import run_ranks

SHAPE = Shape(sequence=128, microbatch=1, hidden=128, heads=4)


def measured(tp: int) -> list[dict[str, Any]]:
    parallel_state.initialize_model_parallel(tp)
    return measure(SHAPE, tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_recompute_saves_what_the_formulas_say(tp: int) -> None:
    everywhere = run_ranks(tp, measured, tp)
    assert all(rows == everywhere[0] for rows in everywhere)
    for sequence_parallel in {row["sequence_parallel"] for row in everywhere[0]}:
        rows = [row for row in everywhere[0] if row["sequence_parallel"] == sequence_parallel]
        found = {row["recompute"]: row["bytes_per_sbh"] for row in rows if row["attention"] == "unfused"}
        formula = {row["recompute"]: row["formula_per_sbh"] for row in rows}
        for recompute in ("none", "selective", "full"):
            # Scaled queries are kept beside the queries: 2 s b h / tp more than the formula without recompute.
            assert found[recompute] == pytest.approx(formula[recompute], rel=0.05)
        for recompute in ("selective", "full"):
            saving = formula["none"] - formula[recompute]
            assert found["none"] - found[recompute] == pytest.approx(saving, rel=0.1)
        # Of the norms, the outputs go; of the feed-forward block, all but its input (which norms compute again).
        cut = tp if sequence_parallel else 1
        assert found["selective"] - found["core_attn layernorm"] == pytest.approx(4 / cut, rel=0.05)
        assert found["core_attn layernorm"] - found["core_attn layernorm mlp"] == pytest.approx(16 / tp, rel=0.02)
        default = {row["recompute"]: row["bytes_per_sbh"] for row in rows if row["attention"] == "sdpa"}
        assert default["none"] == pytest.approx(found["selective"], rel=0.02)  # its kernel recomputes by itself
