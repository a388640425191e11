"""The fast selection notices planted mistakes: a proof that could not fail would prove nothing."""

from __future__ import annotations

import pytest

from megatron.training.verify.compare import violations
from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.equivalence.mutations import BY_NAME, MUTATIONS
from tests.worker_pool import RankFailure


def smallest_layout(name: str) -> Row:
    """Of the fast selection the layout with fewest ranks, then fewest layers, in which a mistake matters."""
    rows = [row for row in layouts.fast_selection() if BY_NAME[name].matters_in(row)]
    assert rows, f"no layout of the fast selection can notice this: {name}"
    return min(rows, key=lambda row: (axes.num_ranks(row), axes.num_layers(row), row["micro-batch"] == "1"))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_mistake_is_noticed(name: str) -> None:
    row = smallest_layout(name)
    try:
        found = [str(deviation) for deviation in violations(layouts.deviations(row, layouts.FAST_STEPS, name))]
    except RankFailure as failure:
        found = [str(failure)]
    assert any(BY_NAME[name].noticed_by in text for text in found), "\n".join([layouts.name_of(row), *found])


def test_there_are_enough_mistakes() -> None:
    assert len(MUTATIONS) == len(BY_NAME) >= 20
