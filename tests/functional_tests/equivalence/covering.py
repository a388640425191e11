"""Covering designs: few rows in which every allowed combination of any two (or some three) values occurs.

Greedy, one row at a time (Cohen et al., "The AETG system", IEEE TSE 23(7), 1997), with rules that forbid combinations.
The same input gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

Row = dict[str, str]
Combination = frozenset[tuple[str, str]]

CANDIDATES = 6
"""Rows that are tried for each one that is kept."""


@dataclass(frozen=True)
class Rule:
    """A condition that every row fulfils."""

    axes: tuple[str, ...]
    holds: Callable[..., bool]
    """Takes the values of `axes` in this order."""

    def allows(self, row: Mapping[str, str]) -> bool:
        """Whether `row` fulfils it, as far as it is filled in."""
        values = [row.get(axis) for axis in self.axes]
        return None in values or self.holds(*values)


class Design:
    """The space of rows: axes with their values, and rules. The first value of an axis is its plain one."""

    def __init__(
        self,
        axes: Mapping[str, Sequence[str]],
        rules: Iterable[Rule],
        prices: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        """`prices` say how many new combinations an expensive value must bring before it is taken."""
        self.prices = prices or {}
        self.axes = {name: list(values) for name, values in axes.items()}
        self.rules: dict[str, list[Rule]] = {name: [] for name in self.axes}
        for rule in rules:
            for name in rule.axes:
                self.rules[name].append(rule)

    def allows(self, row: Mapping[str, str]) -> bool:
        """Whether no rule forbids what is filled in."""
        return all(rule.allows(row) for name in row for rule in self.rules[name])

    def completed(self, partial: Row) -> Row | None:
        """A whole row with these values, plain ones preferred; None if the rules leave none."""
        if not self.allows(partial):
            return None
        row = self._extend(dict(partial), [name for name in self.axes if name not in partial])
        return row and {name: row[name] for name in self.axes}

    def _extend(self, row: Row, names: list[str]) -> Row | None:
        if not names:
            return row
        name, *rest = names
        for value in self.axes[name]:
            row[name] = value
            if all(rule.allows(row) for rule in self.rules[name]) and self._extend(row, rest) is not None:
                return row
        del row[name]
        return None

    def combinations(self, axes: Iterable[str], strength: int) -> Iterator[Combination]:
        """Every allowed combination of values of `strength` of these axes."""
        for names in combinations(axes, strength):
            for values in product(*(self.axes[name] for name in names)):
                if self.completed(dict(zip(names, values))) is not None:
                    yield frozenset(zip(names, values))

    def cover(self, wanted: Iterable[Combination], given: Iterable[Row] = (), seed: int = 0) -> list[Row]:
        """Rows in which all of `wanted` occur, beginning with those `given`."""
        generator = random.Random(seed)
        rows = list(given)
        left = {c: None for c in wanted if not any(c <= row.items() for row in rows)}  # a set would lose their order
        while left:
            first = next(iter(left))
            row = max((self._grow(first, left, generator) for _ in range(CANDIDATES)), key=lambda r: _gain(r, left))
            rows.append(row)
            for combination in [c for c in left if c <= row.items()]:
                del left[combination]
        return rows

    def _grow(self, start: Combination, left: Mapping[Combination, None], generator: random.Random) -> Row:
        """A row that contains `start` and, axis by axis in random order, the value that covers most of `left`."""
        row = dict(start)
        names = [name for name in self.axes if name not in row]
        generator.shuffle(names)
        near: dict[tuple[str, str], list[Combination]] = {}
        for combination in left:
            for item in combination:
                near.setdefault(item, []).append(combination)
        for name in names:
            values = list(self.axes[name])
            generator.shuffle(values)
            gains = {v: self._gain_of(name, v, row, near) - self.prices.get((name, v), 0.0) for v in values}
            for value in sorted(values, key=lambda v: -gains[v]):
                if self.completed({**row, name: value}) is not None:
                    row[name] = value
                    break
        return {name: row[name] for name in self.axes}

    @staticmethod
    def _gain_of(name: str, value: str, row: Row, near: Mapping[tuple[str, str], list[Combination]]) -> float:
        """Combinations that the value completes, and a little for those that it only begins."""
        gain = 0.0
        for combination in near.get((name, value), ()):
            others = [item for item in combination if item[0] != name]
            if all(row.get(axis) == wanted for axis, wanted in others):
                gain += 1.0
            elif all(axis not in row or row[axis] == wanted for axis, wanted in others):
                gain += 0.01
        return gain


def _gain(row: Row, left: Iterable[Combination]) -> int:
    items = row.items()
    return sum(combination <= items for combination in left)
