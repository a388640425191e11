"""Layouts never change the numbers: each computes in float32 what one process computes in float64."""

from __future__ import annotations

import pytest

from megatron.training.verify.compare import violations
from tests.functional_tests.equivalence import layouts
from tests.functional_tests.equivalence.covering import Row


def check(row: Row) -> None:
    found = layouts.deviations(row)
    assert len(found) == 9
    assert not violations(found), "\n".join(map(str, found))


@pytest.mark.parametrize("row", layouts.fast_selection(), ids=layouts.name_of)
def test_layout_equals_one_process(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_equals_one_process() -> None:
    wrong = {layouts.name_of(row): found for row in layouts.matrix() if (found := violations(layouts.deviations(row)))}
    assert not wrong
