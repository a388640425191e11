"""How far a measurement is from its reference, against how far rounding may take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy

from megatron.training.verify.measure import Measurement
from megatron.training.verify.tensors import Array

TINY_GRADIENT = 1e-4
"""Share of the largest gradient norm below which a parameter's gradient is what rounding leaves of cancelled terms: its
deviation is then measured against this share instead of against its own norm."""


@dataclass(frozen=True)
class Bounds:
    """What is allowed. The defaults are those of float32 against float64.

    gradients: relative 2-norm of each parameter's gradient. An fp32 sum of n terms in any order is within n·2⁻²⁴ of
        the exact one, in practice √n·2⁻²⁴: with the sums of a small model (n of some thousands) a few 1e-6.
    loss, grad_norm, validation: relative.
    weights: relative to the distance that the weights moved, plus one rounding a step. The Adam update g / (|g| + eps)
        amplifies a relative deviation of g by no more than 1 + max|g|/eps, so the bound means something only with an
        eps of the size of the gradients, where this factor is about 10.
    """

    gradients: float = 1e-5
    loss: float = 1e-5
    grad_norm: float = 1e-5
    validation: float = 1e-5
    weights: float = 1e-4
    rounding: float = 2.0**-24
    """Of a weight, each step."""
    of_gradient: Mapping[str, float] = field(default_factory=dict)
    """Of single parameters, instead of `gradients`."""
    of_weight: Mapping[str, float] = field(default_factory=dict)
    """Of single parameters, relative to the distance that they moved, instead of `weights` and `rounding`."""


@dataclass(frozen=True)
class Deviation:
    """One comparison."""

    quantity: str
    found: float
    allowed: float
    where: str = ""
    """The step or the parameter in which it is largest in terms of what is allowed there."""

    @property
    def is_violation(self) -> bool:
        """Not-a-number violates, too."""
        return not self.found <= self.allowed

    @property
    def share(self) -> float:
        """Deviation as a share of what is allowed."""
        if self.found <= self.allowed == 0.0:
            return 0.0
        return self.found / self.allowed if self.allowed else numpy.inf

    def __str__(self) -> str:
        mark = "VIOLATED" if self.is_violation else "ok"
        place = f" ({self.where})" if self.where else ""
        return f"{self.quantity}: {self.found:.2e}, allowed {self.allowed:.2e}: {mark}{place}"


def compare(found: Measurement, reference: Measurement, bounds: Bounds | None = None) -> list[Deviation]:
    """Every deviation, each quantity with its worst place.

    The reference's initial weights, in whatever type, must be those of the measurement to the bit.
    """
    b = bounds or Bounds()
    first, last = _relative(found.losses, reference.losses), _relative(found.grad_norms, reference.grad_norms)
    validation = _relative([found.validation_loss], [reference.validation_loss])
    gradient_bound = lambda name: b.of_gradient.get(name, b.gradients)  # noqa: E731
    weight_bound = _weight_bound(reference, b)
    return [
        _same_initial_weights(found, reference),
        _agreement(found),
        Deviation("gradient of vocabulary padding", found.padding_gradient, 0.0),
        _worst("loss", first, b.loss),
        _worst("gradients", gradient_deviations(found, reference).items(), gradient_bound),
        _worst("gradient norm", last, b.grad_norm),
        _worst("weights", weight_deviations(found, reference).items(), weight_bound),
        _worst("validation loss", validation, b.validation),
        Deviation("steps with other batch sizes", _different(found.batch_sizes, reference.batch_sizes), 0.0),
    ]


def violations(deviations: Sequence[Deviation]) -> list[Deviation]:
    """Those that are too large."""
    return [deviation for deviation in deviations if deviation.is_violation]


def spread(runs: Sequence[Measurement], reference: Measurement, factor: float) -> Bounds:
    """Bounds of `factor` times the largest deviation that some of `runs` have, for each quantity and parameter."""

    def largest(of: Callable[[Measurement], float]) -> float:
        return factor * max(map(of, runs))

    def largest_by_name(of: Callable[[Measurement, Measurement], dict[str, float]]) -> dict[str, float]:
        tables = [of(run, reference) for run in runs]
        return {name: factor * max(table[name] for table in tables) for name in tables[0]}

    return Bounds(
        loss=largest(lambda run: max(d for _, d in _relative(run.losses, reference.losses))),
        grad_norm=largest(lambda run: max(d for _, d in _relative(run.grad_norms, reference.grad_norms))),
        validation=largest(
            lambda run: max(d for _, d in _relative([run.validation_loss], [reference.validation_loss]))
        ),
        of_gradient=largest_by_name(gradient_deviations),
        of_weight=largest_by_name(weight_deviations),
    )


def _worst(quantity: str, parts: object, allowed: float | Callable[[str], float]) -> Deviation:
    """The one of (place, deviation) that is largest in terms of what is allowed there."""
    worst = Deviation(quantity, 0.0, allowed if isinstance(allowed, float) else 0.0)
    for where, value in parts:  # type: ignore[attr-defined]
        one = Deviation(quantity, value, allowed if isinstance(allowed, float) else allowed(where), where)
        if not one.share < worst.share:  # not-a-number wins
            worst = one
        if numpy.isnan(value):
            break
    return worst


def _same_initial_weights(found: Measurement, reference: Measurement) -> Deviation:
    different = [*found.initial.missing]
    names = found.initial.tensors.keys() | reference.initial.tensors.keys()
    for name in sorted(names):
        mine, theirs = found.initial.tensors.get(name), reference.initial.tensors.get(name)
        if mine is None or theirs is None or not numpy.array_equal(mine, theirs.astype(mine.dtype)):
            different.append(name)
    return Deviation("initial weights that differ", float(len(different)), 0.0, ", ".join(different[:3]))


def _agreement(found: Measurement) -> Deviation:
    """Copies of a weight or gradient on several ranks are equal to the bit, at the beginning and at the end."""
    parts = {"initial weight": found.initial, "gradient": found.gradients, "weight": found.final}
    disagreements = [(f"{kind} of {p.disagreement[1]}", p.disagreement[0]) for kind, p in parts.items()]
    if not any(difference for _, difference in disagreements):
        return Deviation("copies on several ranks", 0.0, 0.0)
    return _worst("copies on several ranks", disagreements, 0.0)


def _different(found: list[int], reference: list[int]) -> float:
    return float(abs(len(found) - len(reference)) + sum(a != b for a, b in zip(found, reference)))


def _relative(found: Sequence[float], reference: Sequence[float]) -> Iterator[tuple[str, float]]:
    if len(found) != len(reference):
        yield f"{len(found)} steps instead of {len(reference)}", numpy.inf
    for step, (mine, theirs) in enumerate(zip(found, reference), start=1):
        yield f"step {step}", abs(mine - theirs) / max(abs(theirs), float(numpy.finfo(float).tiny))


def _difference(found: Mapping[str, Array], name: str, theirs: Array) -> float:
    """2-norm of the difference; not-a-number where the tensor is missing or has another shape."""
    mine = found.get(name)
    if mine is None or mine.shape != theirs.shape:
        return numpy.nan
    return float(numpy.linalg.norm(mine.astype(numpy.float64) - theirs))


def gradient_deviations(found: Measurement, reference: Measurement) -> dict[str, float]:
    """Deviation of each parameter's gradient, relative to its norm (or to `TINY_GRADIENT` of the largest norm)."""
    norms = {name: float(numpy.linalg.norm(g)) for name, g in reference.gradients.tensors.items()}
    floor = TINY_GRADIENT * max(norms.values(), default=0.0)
    return {
        name: _difference(found.gradients.tensors, name, theirs) / max(norms[name], floor)
        for name, theirs in reference.gradients.tensors.items()
    }


def weight_deviations(found: Measurement, reference: Measurement) -> dict[str, float]:
    """Deviation of each parameter's final weights, relative to the distance that they moved."""
    return {
        name: _difference(found.final.tensors, name, theirs) / _moved(reference, name)
        for name, theirs in reference.final.tensors.items()
    }


def _moved(reference: Measurement, name: str) -> float:
    moved = float(numpy.linalg.norm(reference.final.tensors[name] - reference.initial.tensors[name]))
    return max(moved, float(numpy.finfo(float).tiny))


def _weight_bound(reference: Measurement, bounds: Bounds) -> Callable[[str], float]:
    def allowed(name: str) -> float:
        if name in bounds.of_weight:
            return bounds.of_weight[name]
        size = float(numpy.linalg.norm(reference.final.tensors[name]))
        return bounds.weights + bounds.rounding * len(reference.losses) * size / _moved(reference, name)

    return allowed
