"""How far a measurement is from its reference, against how far rounding may take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    weights: relative to the distance that the weights moved, plus one rounding to fp32 a step. The Adam update
        g / (|g| + eps) amplifies a relative deviation of g by no more than 1 + max|g|/eps, so the bound means something
        only with an eps of the size of the gradients, where this factor is about 10.
    """

    gradients: float = 1e-5
    loss: float = 1e-5
    grad_norm: float = 1e-5
    validation: float = 1e-5
    weights: float = 1e-4
    rounding: float = 2.0**-24
    """Of a weight, each step."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Allowed deviation of single parameters' gradients, where it is known better than by `gradients`."""


@dataclass(frozen=True)
class Deviation:
    """One comparison."""

    quantity: str
    found: float
    allowed: float
    where: str = ""
    """The step or the parameter in which it is largest."""

    @property
    def is_violation(self) -> bool:
        """Not-a-number violates, too."""
        return not self.found <= self.allowed

    def __str__(self) -> str:
        mark = "VIOLATED" if self.is_violation else "ok"
        place = f" ({self.where})" if self.where else ""
        return f"{self.quantity}: {self.found:.2e}, allowed {self.allowed:.2e}: {mark}{place}"


def compare(found: Measurement, reference: Measurement, bounds: Bounds | None = None) -> list[Deviation]:
    """Every deviation, each quantity with its worst place.

    The reference's initial weights, in whatever type, must be those of the measurement to the bit.
    """
    bounds = bounds or Bounds()
    return [
        _same_initial_weights(found, reference),
        _agreement(found),
        Deviation("gradient of vocabulary padding", found.padding_gradient, 0.0),
        _worst("loss", _relative(found.losses, reference.losses), bounds.loss),
        _worst("gradients", _gradient_deviations(found, reference, bounds), 1.0, scale=bounds.gradients),
        _worst("gradient norm", _relative(found.grad_norms, reference.grad_norms), bounds.grad_norm),
        _worst("weights", _weight_deviations(found, reference, bounds), 1.0, scale=bounds.weights),
        _worst("validation loss", _relative([found.validation_loss], [reference.validation_loss]), bounds.validation),
        Deviation("batch sizes", float(found.batch_sizes != reference.batch_sizes), 0.0),
    ]


def violations(deviations: list[Deviation]) -> list[Deviation]:
    """Those that are too large."""
    return [deviation for deviation in deviations if deviation.is_violation]


def _worst(quantity: str, parts: Iterator[tuple[str, float]], allowed: float, scale: float = 1.0) -> Deviation:
    """The largest of (place, deviation), both it and what is allowed multiplied by `scale`."""
    place, value = "", 0.0
    for where, deviation in parts:
        if not deviation <= value:  # not-a-number wins and stays
            place, value = where, deviation
        if numpy.isnan(value):
            break
    return Deviation(quantity, value * scale, allowed * scale, place)


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
    disagreements = ((f"{kind} of {p.disagreement[1]}", p.disagreement[0]) for kind, p in parts.items())
    return _worst("copies on several ranks", disagreements, 0.0)


def _relative(found: list[float], reference: list[float]) -> Iterator[tuple[str, float]]:
    if len(found) != len(reference):
        yield f"{len(found)} steps instead of {len(reference)}", numpy.inf
    for step, (mine, theirs) in enumerate(zip(found, reference), start=1):
        yield f"step {step}", abs(mine - theirs) / max(abs(theirs), numpy.finfo(float).tiny)


def _pairs(found: dict[str, Array], reference: dict[str, Array]) -> Iterator[tuple[str, Array, Array]]:
    for name, theirs in reference.items():
        mine = found.get(name)
        fits = mine is not None and mine.shape == theirs.shape
        yield name, mine.astype(numpy.float64) if fits else numpy.full(theirs.shape, numpy.nan), theirs  # type: ignore[union-attr]


def _gradient_deviations(found: Measurement, reference: Measurement, bounds: Bounds) -> Iterator[tuple[str, float]]:
    """(parameter, deviation of its gradient as a multiple of what is allowed)."""
    norms = {name: float(numpy.linalg.norm(g)) for name, g in reference.gradients.tensors.items()}
    floor = TINY_GRADIENT * max(norms.values(), default=0.0)
    for name, mine, theirs in _pairs(found.gradients.tensors, reference.gradients.tensors):
        allowed = bounds.spread.get(name, bounds.gradients) * max(norms[name], floor)
        yield name, float(numpy.linalg.norm(mine - theirs)) / allowed


def _weight_deviations(found: Measurement, reference: Measurement, bounds: Bounds) -> Iterator[tuple[str, float]]:
    """(parameter, deviation of its final weights as a multiple of what is allowed)."""
    steps = len(reference.losses)
    for name, mine, theirs in _pairs(found.final.tensors, reference.final.tensors):
        moved = numpy.linalg.norm(theirs - reference.initial.tensors[name])
        allowed = bounds.weights * moved + bounds.rounding * steps * numpy.linalg.norm(theirs)
        yield name, float(numpy.linalg.norm(mine - theirs) / allowed)
