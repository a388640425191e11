"""The reference itself is checked: the library's model in float64 is a plain GPT written from the formulas."""

from __future__ import annotations

import types

import numpy
import pytest
import torch

from megatron.training.verify.batches import RandomDocuments
from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.covering import Row
from tests.functional_tests.equivalence.plain_gpt import LENGTH, PlainGPT, PlainTraining

EQUAL = 1e-12
"""Relative. float64 rounds at 1e-16; measured 1e-14."""


def numeric_rows() -> list[Row]:
    """Every pair of values that change the numbers, in the plain layout."""
    design = axes.design()
    rows = design.cover(design.combinations(axes.NUMERIC_AXES, 2))
    return [axes.plain_row() | {name: row[name] for name in axes.NUMERIC_AXES} for row in rows]


@pytest.mark.parametrize("row", numeric_rows(), ids=layouts.name_of)
def test_reference_is_a_plain_gpt(row: Row) -> None:
    words, uneven = axes.reference_of(row, layouts.STEPS)
    reference = layouts.reference_run(tuple(words), uneven)
    plain = plain_training(row, reference.initial.tensors, uneven, reference.batch_sizes)
    assert plain.losses == pytest.approx(reference.losses, rel=EQUAL)
    assert plain.grad_norms == pytest.approx(reference.grad_norms, rel=EQUAL)
    assert plain.first_gradients.keys() == reference.gradients.tensors.keys()
    for name, gradient in plain.first_gradients.items():
        assert relative(reference.gradients.tensors[name], gradient) < EQUAL, name
    for name, weight in plain.model.weights.items():
        assert relative(reference.final.tensors[name], weight) < EQUAL, name


def relative(found: numpy.ndarray, expected: torch.Tensor) -> float:
    difference = numpy.linalg.norm(found - expected.detach().numpy())
    return float(difference / max(numpy.linalg.norm(expected.detach().numpy()), 1e-3))


def plain_training(row: Row, initial: dict[str, numpy.ndarray], uneven: bool, batch_sizes: list[int]) -> PlainTraining:
    vocab_size = 64 if row["vocabulary"] == "whole" else 61
    weights = {name: torch.from_numpy(w).double() for name, w in initial.items()}
    model = PlainGPT(row, weights, axes.num_layers(row), vocab_size)
    is_isolated = row["documents"] == "isolated"
    settings = types.SimpleNamespace(
        seq_length=LENGTH,
        reset_position_ids=is_isolated,
        reset_attention_mask=is_isolated,
        eod_mask_loss=is_isolated,
        attention_backend="flash",
        create_attention_mask_in_dataloader=False,
    )
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, eod=vocab_size - 1)
    samples = RandomDocuments(settings, tokenizer, 40, uneven=uneven)
    training = PlainTraining(row, model, decay_samples=sum(batch_sizes))
    for size in batch_sizes:
        training.step([samples[training.consumed + i] for i in range(size)], tokenizer.eod)
    return training
