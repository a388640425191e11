"""Mamba models and hybrids: each layout computes in float32 what one process computes in float64.

Those of every session, and planted mistakes, are in `tests/functional_tests/test_mamba.py`.
"""

from __future__ import annotations

import pytest

from megatron.training.verify.compare import violations
from tests.functional_tests.equivalence.hybrids import HYBRIDS
from tests.functional_tests.equivalence.layouts import STEPS


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_equals_one_process() -> None:
    found = {HYBRIDS.name_of(row): violations(HYBRIDS.deviations(row, STEPS)) for row in HYBRIDS.matrix()}
    assert not {name: list(map(str, wrong)) for name, wrong in found.items() if wrong}


def test_every_pair_of_values_has_a_layout() -> None:
    rows = HYBRIDS.matrix()
    assert all(any(pair <= row.items() for row in rows) for pair in HYBRIDS.pairs())
    assert all(HYBRIDS.design().allows(row) and HYBRIDS.num_ranks(row) <= 8 for row in rows)
