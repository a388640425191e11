"""Names shared by all datasets: the splits of a corpus and the rules for blends of several."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy


class Split(Enum):
    """The parts a corpus is cut into, in the order used by every list with one entry a split."""

    train = 0
    valid = 1
    test = 2


def compile_helpers() -> None:
    """Do nothing: index building is vectorised numpy. Kept for programs that call it."""


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, in float64."""
    values = numpy.array(weights, dtype=numpy.float64)
    total = numpy.sum(values)
    if not total > 0 or (values < 0).any():
        raise ValueError(f"weights must not be negative and must have a positive sum, got {list(weights)}")
    return (values / total).tolist()


def get_blend_from_list(blend: list[str] | None) -> tuple[list[str], list[float] | None] | None:
    """Read `--data-path`: (prefixes, weights), weights None where only prefixes were given.

    An odd number of elements are all prefixes. An even number is read as pairs "weight prefix"; when no
    element in a weight's place is a number, all are prefixes.

    Raises:
        ValueError: some of the elements in a weight's place are numbers and some are not.
    """
    if blend is None:
        return None
    if len(blend) % 2 == 1:
        return [prefix.strip() for prefix in blend], None
    places = blend[0::2]
    weights = [_parse_float(place) for place in places]
    numbers = [weight for weight in weights if weight is not None]
    if not numbers:
        return [prefix.strip() for prefix in blend], None
    if len(numbers) != len(weights):
        wrong = [place for place, weight in zip(places, weights) if weight is None]
        raise ValueError(
            f"a blend is either 'weight prefix weight prefix ...' or prefixes only, but {wrong} stand where "
            f"a weight is expected, beside the numbers {numbers}: give every prefix a weight, or none"
        )
    return [prefix.strip() for prefix in blend[1::2]], numbers


def _parse_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
