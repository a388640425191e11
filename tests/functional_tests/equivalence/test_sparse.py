"""Experts, latent attention and further tokens: every layout computes in float32 what one process does in float64, and
planted mistakes are noticed."""

from __future__ import annotations

import pytest

from megatron.training.verify.compare import violations
from tests.functional_tests.equivalence import sparse
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.equivalence.sparse_mutations import BY_NAME, MUTATIONS
from tests.worker_pool import RankFailure

FAST_LAYOUTS = 3
"""Those of every session: they have tensor, pipeline, context, data and expert parallel ranks."""
FAST_MISTAKES = ("experts' gradients are averaged over their",)
_ROWS = [
    pytest.param(row, marks=() if number < FAST_LAYOUTS else pytest.mark.slow, id=sparse.name_of(row))
    for number, row in enumerate(sparse.fast_selection())
]


@pytest.mark.parametrize("row", _ROWS)
def test_layout_equals_one_process(row: Row) -> None:
    found = sparse.deviations(row)
    assert not violations(found), "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_equals_one_process() -> None:
    found = {sparse.name_of(row): violations(sparse.deviations(row)) for row in sparse.matrix()}
    assert not {name: list(map(str, wrong)) for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.startswith(FAST_MISTAKES) else pytest.mark.slow) for n in BY_NAME]
)
def test_mistake_is_noticed(name: str) -> None:
    try:
        wrong = violations(sparse.deviations(sparse.smallest_layout(name), mutation=name))
        found = [str(deviation) for deviation in wrong]
    except RankFailure as failure:
        found = [str(failure)]
    assert any(BY_NAME[name].noticed_by in text for text in found), "\n".join(found)


def test_there_are_enough_mistakes() -> None:
    assert len(MUTATIONS) == len(BY_NAME) >= 10
