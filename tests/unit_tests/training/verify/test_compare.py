"""Deviations are measured where they are, against what is allowed there."""

from __future__ import annotations

import copy

import numpy
import pytest

from megatron.training.verify.compare import Bounds, Deviation, compare, spread, violations
from megatron.training.verify.measure import Measurement
from megatron.training.verify.tensors import WholeTensors


def whole(**tensors: object) -> WholeTensors:
    return WholeTensors({name: numpy.asarray(t, dtype=float) for name, t in tensors.items()}, (0.0, ""), [])


@pytest.fixture
def reference() -> Measurement:
    return Measurement(
        initial=whole(a=[1.0, 2.0], b=[[3.0]]),
        gradients=whole(a=[3.0, 4.0], b=[[1e-9]]),
        final=whole(a=[1.0, 2.1], b=[[3.5]]),
        losses=[4.0, 3.0],
        grad_norms=[5.0, 5.0],
        batch_sizes=[8, 8],
        validation_loss=3.5,
        padding_gradient=0.0,
    )


def violated(found: Measurement, reference: Measurement, bounds: Bounds | None = None) -> dict[str, Deviation]:
    return {deviation.quantity: deviation for deviation in violations(compare(found, reference, bounds))}


def test_equal_measurements_do_not_deviate(reference: Measurement) -> None:
    assert not violated(copy.deepcopy(reference), reference)
    assert all(deviation.found == 0.0 for deviation in compare(reference, reference))


def test_gradient_is_relative_to_its_norm(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    found.gradients.tensors["a"][0] += 4e-5  # 8e-6 of the norm of 5
    assert not violated(found, reference)
    found.gradients.tensors["a"][0] += 4e-5
    (deviation,) = violated(found, reference).values()
    assert (deviation.quantity, deviation.where) == ("gradients", "a")
    assert deviation.found == pytest.approx(1.6e-5)
    assert str(deviation) == "gradients: 1.60e-05, allowed 1.00e-05: VIOLATED (a)"


def test_tiny_gradient_is_relative_to_a_share_of_the_largest(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    found.gradients.tensors["b"][0, 0] = 4e-9  # far from 1e-9, and nothing beside 1e-4 of 5
    assert not violated(found, reference)
    found.gradients.tensors["b"][0, 0] = 1e-8
    assert list(violated(found, reference)) == ["gradients"]


def test_weights_are_relative_to_the_distance_moved(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    found.final.tensors["a"][1] += 0.5e-5  # of 0.1
    assert not violated(found, reference)
    found.final.tensors["a"][1] += 1e-5
    assert list(violated(found, reference)) == ["weights"]


def test_the_worst_is_the_worst_in_terms_of_what_is_allowed(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    found.gradients.tensors["a"][0] += 1e-3
    found.gradients.tensors["b"][0, 0] += 5e-8
    bounds = Bounds(of_gradient={"a": 1.0, "b": 1e-6})
    assert violated(found, reference, bounds)["gradients"].where == "b"


@pytest.mark.parametrize("part", ["initial", "gradients", "final"])
@pytest.mark.parametrize("how", ["missing", "shape", "nan"])
def test_what_is_not_there_violates(part: str, how: str, reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    tensors = getattr(found, part).tensors
    if how == "missing":
        del tensors["a"]
    else:
        tensors["a"] = numpy.zeros(3) if how == "shape" else numpy.array([1.0, numpy.nan])
    assert len(violated(found, reference)) == 1


def test_initial_weights_are_compared_in_the_type_of_the_layout(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    reference.initial.tensors["a"] = numpy.array([0.1, 2.0])
    found.initial.tensors["a"] = numpy.array([0.1, 2.0], dtype=numpy.float32)
    assert "initial weights that differ" not in violated(found, reference)
    found.initial.tensors["a"][0] = numpy.nextafter(found.initial.tensors["a"][0], numpy.float32(1))
    assert violated(found, reference)["initial weights that differ"].where == "a"


def test_scalars(reference: Measurement) -> None:
    found = copy.deepcopy(reference)
    found.losses[1] = numpy.nan
    found.grad_norms[0] *= 1 + 2e-5
    found.validation_loss *= 1 - 2e-5
    found.batch_sizes = [8, 4]
    found.padding_gradient = 1e-30
    found.final.disagreement = (1e-7, "a")
    assert {quantity: d.where for quantity, d in violated(found, reference).items()} == {
        "loss": "step 2",
        "gradient norm": "step 1",
        "validation loss": "step 1",
        "steps with other batch sizes": "",
        "gradient of vocabulary padding": "",
        "copies on several ranks": "weight of a",
    }
    found.losses = [4.0]
    assert violated(found, reference)["loss"].where == "1 steps instead of 2"


def test_spread_allows_a_multiple_of_the_farthest_run(reference: Measurement) -> None:
    near, far, found = (copy.deepcopy(reference) for _ in range(3))
    near.gradients.tensors["a"][0] += 0.005
    far.gradients.tensors["a"][0] += 0.05
    bounds = spread([near, far], reference, factor=2.0)
    assert bounds.of_gradient["a"] == pytest.approx(0.02)
    found.gradients.tensors["a"][0] += 0.09
    assert not violated(found, reference, bounds)
    found.gradients.tensors["a"][0] += 0.02
    assert list(violated(found, reference, bounds)) == ["gradients"]
