"""Runs layouts and their references in the worker pool, and compares them."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations
from typing import Any

from megatron.training.verify.compare import Deviation, compare, violations
from megatron.training.verify.measure import Measurement, Samples, measure
from megatron.training.verify.verify import program_of
from tests.functional_tests.equivalence import axes, encoder_mutations, mutations
from tests.functional_tests.equivalence.covering import Combination, Row
from tests.worker_pool import run_ranks

GPT = "pretrain_gpt"
MUTATIONS = mutations.BY_NAME | mutations.OF_MAMBA | encoder_mutations.BY_NAME
STEPS = 5
FAST_STEPS = 2
"""Iterations in the matrix, and in the fast selection."""
SAME_IN_FLOAT64 = 1e-10


@cache
def matrix() -> list[Row]:
    """Every layout, the fast selection first: all pairs of values of all axes, and all triples of what divides the work
    over ranks."""
    design = axes.design()
    triples = design.combinations(axes.AXES_BY_THREE, 3)
    return design.cover([*triples, *pairs()], fast_selection())


@cache
def pairs() -> list[Combination]:
    """Every two values of two axes that may stand together."""
    design = axes.design()
    return list(design.combinations(design.axes, 2))


@cache
def fast_selection() -> list[Row]:
    """Layouts that run in every test session: pairs of values on up to four ranks, every three ways to divide the work
    on eight, and what planted mistakes need."""
    small, large = axes.design(fast=True, max_ranks=4), axes.design(fast=True)
    rows = small.cover(axes.fast_combinations(small))
    rows += large.cover(frozenset((way, "2") for way in three) for three in combinations(("tp", "cp", "pp", "dp"), 3))
    for mutation in mutations.MUTATIONS:
        if not any(mutation.matters_in(row) for row in rows):
            rows += filter(None, [small.completed(mutation.smallest_layout())])
    return rows


num_ranks = axes.num_ranks


def not_plain(row: Row) -> Row:
    """What distinguishes a layout from one process without anything special."""
    plain = axes.plain_row()
    return {name: value for name, value in row.items() if value != plain[name]}


def name_of(row: Row) -> str:
    """E.g. `tp=2 pp=2 schedule=gpipe`: what is not plain."""
    return " ".join(f"{name}={value}" for name, value in not_plain(row).items()) or "plain"


def deviations(row: Row, steps: int, mutation: str | None = None) -> list[Deviation]:
    """How far a layout is from its reference, with a planted mistake or without one."""
    words, uneven = axes.reference_of(row, steps)
    reference = reference_run(tuple(words), uneven)
    found = run(axes.num_ranks(row), axes.flags_of(row, steps), uneven, mutation=mutation)
    return compare(found, reference)


def but_for_rounding(found: list[Deviation], in_float64: Callable[[], list[Deviation]]) -> list[Deviation]:
    """Where bounds of float32 do not hold, the layout runs once more in float64: if it equals one process there, its
    deviations are rounding, of which up to ten times the bound is allowed.

    Args:
        found: deviations of a layout in float32.
        in_float64: the same of a run in float64.
    """
    if not violations(found):
        return found
    exact = in_float64()
    if any(deviation.found > SAME_IN_FLOAT64 for deviation in exact):
        return found
    return [
        replace(d, allowed=min(d.found, 10 * d.allowed), where=f"{d.where}; {e.found:.1e} in float64")
        if d.is_violation
        else d
        for d, e in zip(found, exact, strict=True)
    ]


@lru_cache(maxsize=64)
def reference_run(words: tuple[str, ...], uneven: bool, program: str = GPT) -> Measurement:
    """One process in float64."""
    return run(1, list(words), uneven, program=program, in_float64=True)


def run(ranks: int, words: list[str], uneven: bool = False, **options: Any) -> Measurement:
    """What `ranks` processes compute from these flags; options as for `run_here`."""
    found: Measurement = run_ranks(ranks, run_here, words, uneven, options)[0]
    return found


def run_here(words: list[str], uneven: bool, options: dict[str, Any]) -> Measurement | None:
    """One rank's part of a run; the measurement on rank 0.

    `options`: those of `measure`, the module of a `program` other than GPT's, and the name of a `mutation` to plant.
    """
    options = dict(options)
    program = program_of(importlib.import_module(options.pop("program", GPT)))
    name = options.pop("mutation", None)
    planted = mutations.planted(None if name is None else MUTATIONS[name])
    quiet = io.StringIO()
    with planted, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return measure(program, words, Samples(uneven), **options)
