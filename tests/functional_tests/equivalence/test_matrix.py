"""Layouts never change the numbers: each computes in float32 what one process computes in float64."""

from __future__ import annotations

import pytest

from megatron.training.verify.compare import violations
from tests.functional_tests.equivalence import layouts
from tests.functional_tests.equivalence.covering import Row


@pytest.mark.parametrize("row", layouts.fast_selection(), ids=layouts.name_of)
def test_layout_equals_one_process(row: Row) -> None:
    found = layouts.deviations(row, layouts.FAST_STEPS)
    assert len(found) == 9
    assert not violations(found), "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_equals_one_process() -> None:
    found = {layouts.name_of(row): violations(layouts.deviations(row, layouts.STEPS)) for row in layouts.matrix()}
    assert not {name: list(map(str, wrong)) for name, wrong in found.items() if wrong}
