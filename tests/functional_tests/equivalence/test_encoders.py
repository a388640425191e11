"""BERT and T5: each layout computes in float32 what one process computes in float64; planted mistakes are noticed."""

from __future__ import annotations

import pytest
import torch

from megatron.training.verify.compare import compare, spread, violations
from megatron.training.verify.verify import SPREAD_FACTOR, SPREAD_RUNS
from tests.functional_tests.equivalence import layouts
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.equivalence.encoder_mutations import BERT_MUTATIONS, FAST_MISTAKES, T5_MUTATIONS
from tests.functional_tests.equivalence.encoders import FAMILIES, fast_rows
from tests.functional_tests.equivalence.layouts import FAST_STEPS, STEPS
from tests.functional_tests.equivalence.mutations import Mutation
from tests.worker_pool import RankFailure

MISTAKES = [
    pytest.param(family, one, id=one.name, marks=() if one.name in FAST_MISTAKES else pytest.mark.slow)
    for family, mistakes in (("bert", BERT_MUTATIONS), ("t5", T5_MUTATIONS))
    for one in mistakes
]
BF16_LAYOUTS = {
    "bert": [{"tp": "2", "sp": "on"}, {"pp": "2", "schedule": "zb-h1"}, {"dp": "2", "sharding": "optimizer"}],
    "t5": [{"tp": "2", "sp": "on"}, {"stages": "1+2"}, {"stages": "2+1", "recompute": "uniform"}],
}


def named(family: str, row: Row) -> str:
    return f"{family} {FAMILIES[family].name_of(row)}"


@pytest.mark.parametrize(("family", "row"), fast_rows(), ids=[named(*one) for one in fast_rows()])
def test_layout_equals_one_process(family: str, row: Row) -> None:
    found = FAMILIES[family].deviations(row, FAST_STEPS)
    assert not violations(found), "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layout_equals_one_process(family: str) -> None:
    matrix = FAMILIES[family]
    found = {matrix.name_of(row): violations(matrix.deviations(row, STEPS)) for row in matrix.matrix()}
    assert not {name: list(map(str, wrong)) for name, wrong in found.items() if wrong}


def test_every_pair_of_values_has_a_layout() -> None:
    for matrix in FAMILIES.values():
        rows = matrix.matrix()
        assert all(any(pair <= row.items() for row in rows) for pair in matrix.pairs())
        assert all(matrix.design().allows(row) and matrix.num_ranks(row) <= 8 for row in rows)


@pytest.mark.parametrize(("family", "mistake"), MISTAKES)
def test_mistake_is_noticed(family: str, mistake: Mutation) -> None:
    matrix = FAMILIES[family]
    rows = [row for row in matrix.matrix() if mistake.matters_in(row)]
    row = min(rows, key=matrix.num_ranks)  # the first of them: one of the fast selection, if that has any
    try:
        found = [str(deviation) for deviation in violations(matrix.deviations(row, FAST_STEPS, mistake.name))]
    except RankFailure as failure:
        found = [str(failure)]
    assert any(mistake.noticed_by in text for text in found), "\n".join([matrix.name_of(row), *found])


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_bf16_deviates_as_a_reordering_does(family: str) -> None:
    matrix = FAMILIES[family]
    plain = matrix.design().completed({})
    assert plain is not None
    options = {"program": matrix.program}
    words = [*matrix.flags_of(plain, FAST_STEPS, layout=False), "--micro-batch-size", "1"]
    reference = layouts.run(1, words, in_float64=True, rounded_to=torch.bfloat16, **options)
    orders = [{}, *({"reordered": seed} for seed in range(SPREAD_RUNS))]
    runs = [layouts.run(1, [*words, "--bf16"], **options, **order) for order in orders]
    bounds = spread(runs, reference, SPREAD_FACTOR)
    for layout in BF16_LAYOUTS[family]:
        row = plain | layout
        found = layouts.run(matrix.num_ranks(row), [*matrix.flags_of(row, FAST_STEPS), "--bf16"], **options)
        assert not violations(compare(found, reference, bounds)), matrix.name_of(row)
