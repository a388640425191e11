"""bf16: a layout is as far from float64 as a reordering of sums takes one process, and a mistake is farther."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from megatron.training.verify.compare import Bounds, compare, spread, violations
from megatron.training.verify.measure import Measurement
from megatron.training.verify.verify import SPREAD_FACTOR, SPREAD_RUNS
from tests.functional_tests.equivalence import axes, layouts, mutations

STEPS = 2
ROW = axes.plain_row(block="llama", output="untied", vocabulary="padded")
BF16 = "--bf16"

LAYOUTS: dict[str, dict[str, str]] = {
    "sequence parallel": {"tp": "2", "sp": "on"},
    "tensor parallel": {"tp": "4"},
    "ring": {"cp": "2"},
    "pipeline, recompute": {"pp": "2", "recompute": "uniform"},
    "distributed optimizer, overlap": {"dp": "2", "sharding": "optimizer", "overlap": "gradients and weights"},
}


@cache
def reference_and_bounds() -> tuple[Measurement, Bounds]:
    """float64 from weights rounded to bf16, and how far one process in bf16 comes with its sums in other orders."""
    words, _ = axes.reference_of(ROW, STEPS)
    reference = layouts.run(1, words, in_float64=True, rounded_to=torch.bfloat16)
    orders = [{}, *({"reordered": seed} for seed in range(SPREAD_RUNS))]
    return reference, spread([layouts.run(1, [*words, BF16], **o) for o in orders], reference, SPREAD_FACTOR)


def wrong(layout: dict[str, str], mutation: str | None = None) -> list[str]:
    row = ROW | layout
    words = [*axes.flags_of(row, STEPS), BF16]
    found = layouts.run(axes.num_ranks(row), words, mutation=mutation)
    reference, bounds = reference_and_bounds()
    return [str(deviation) for deviation in violations(compare(found, reference, bounds))]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layout_deviates_as_a_reordering_does(layout: str) -> None:
    assert not wrong(LAYOUTS[layout])


def test_reordering_explains_little() -> None:
    """The bounds stay those of bf16 (2⁻⁸ a rounding): they would not hide a missing term."""
    _, bounds = reference_and_bounds()
    assert bounds.loss < 2e-3
    assert all(1e-3 < allowed < 0.1 for allowed in bounds.of_gradient.values())


@pytest.mark.parametrize(
    ("layout", "mutation"),
    [
        ("sequence parallel", "gradients of sequence-parallel norms are not summed"),
        ("distributed optimizer, overlap", "gradients of replicas are summed instead of averaged"),
    ],
)
def test_mistakes_are_noticed_in_bf16(layout: str, mutation: str) -> None:
    found = wrong(LAYOUTS[layout], mutation)
    assert any(mutations.BY_NAME[mutation].noticed_by in text for text in found)
