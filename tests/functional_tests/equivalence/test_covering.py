"""The design covers what it claims: every allowed pair, and no row that a rule forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations, product

import pytest

from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.covering import Design, Rule
from tests.functional_tests.program import ROOT

TOY_AXES = {"a": ["0", "1", "2"], "b": ["0", "1", "2"], "c": ["0", "1"], "d": ["0", "1"]}
TOY_RULES = [
    Rule(("a", "b"), lambda a, b: int(a) + int(b) < 4),
    Rule(("b", "c"), lambda b, c: b != "0" or c == "0"),
    Rule(("c", "d"), lambda c, d: c != d),
]


def every_row(design: Design) -> list[dict[str, str]]:
    rows = (dict(zip(design.axes, values)) for values in product(*design.axes.values()))
    return [row for row in rows if design.allows(row)]


def combinations_in(rows: list[dict[str, str]], strength: int, names: list[str]) -> set:
    return {frozenset((n, row[n]) for n in chosen) for row in rows for chosen in combinations(names, strength)}


@pytest.mark.parametrize("strength", [2, 3])
def test_what_is_allowed_is_what_some_whole_row_has(strength: int) -> None:
    """c and d exclude each other's value and b=0 fixes c: (b=0, d=0) is impossible although no rule names the two."""
    design = Design(TOY_AXES, TOY_RULES)
    allowed = set(design.combinations(design.axes, strength))
    assert allowed == combinations_in(every_row(design), strength, list(design.axes))
    assert frozenset({("b", "0"), ("d", "0")}) not in set(design.combinations(design.axes, 2))


@pytest.mark.parametrize("strength", [2, 3])
def test_rows_cover_and_obey(strength: int) -> None:
    design = Design(TOY_AXES, TOY_RULES)
    rows = design.cover(design.combinations(design.axes, strength))
    assert all(design.allows(row) and list(row) == list(design.axes) for row in rows)
    assert combinations_in(rows, strength, list(design.axes)) == set(design.combinations(design.axes, strength))
    assert len(rows) < len(every_row(design)) or strength == 3


def test_pairs_of_many_axes_need_few_rows() -> None:
    design = Design({f"x{i}": ["0", "1", "2"] for i in range(13)}, [])
    assert len(design.cover(design.combinations(design.axes, 2))) <= 24  # the best known design has 15


def test_same_rows_every_time() -> None:
    """In another process, too, where sets have another order: the recorded matrix is that of the next run."""
    command = (
        "from tests.functional_tests.equivalence.covering import Design;"
        "d = Design({f'axis {i}': ['0', '1', '2'] for i in range(7)}, []); print(d.cover(d.combinations(d.axes, 2)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = {
        subprocess.run(
            [sys.executable, "-c", command],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_fast_selection_has_what_it_says() -> None:
    small, rows = axes.design(fast=True, max_ranks=4), layouts.fast_selection()
    assert all(axes.design().allows(row) for row in rows)
    assert combinations_in(rows, 2, list(small.axes)) >= {c for c in axes.fast_combinations(small) if len(c) == 2}
    assert combinations_in(rows, 1, list(axes.RARE)) >= set(small.combinations(axes.RARE, 1))
    large = [
        {name for name in ("tp", "cp", "pp", "dp") if row[name] != "1"} for row in rows if axes.num_ranks(row) == 8
    ]
    assert all(set(three) in large for three in combinations(("tp", "cp", "pp", "dp"), 3))


def test_rows_that_are_given_are_kept_and_count() -> None:
    design = Design(TOY_AXES, TOY_RULES)
    pairs = list(design.combinations(design.axes, 2))
    whole = design.cover(pairs)
    assert design.cover(pairs, whole) == whole
    assert design.cover(pairs, whole[:2])[:2] == whole[:2]


@pytest.mark.slow
def test_matrix_has_every_triple_of_what_divides_the_work() -> None:
    design = axes.design()
    rows = layouts.matrix()
    assert len(rows) >= 150
    names = axes.AXES_BY_THREE
    assert all(design.allows(row) and axes.num_ranks(row) <= axes.MAX_RANKS for row in rows)
    assert combinations_in(rows, 2, list(design.axes)) >= set(design.combinations(design.axes, 2))
    assert combinations_in(rows, 3, names) >= set(design.combinations(names, 3))


def test_a_flag_that_is_not_built_yet_leaves_its_value_out() -> None:
    assert axes.is_built("--tensor-model-parallel-size 2")
    assert not axes.is_built("--use-legacy-models")
    assert not axes.is_built("--a-flag-that-does-not-exist")
