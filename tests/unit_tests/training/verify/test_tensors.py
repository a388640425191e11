"""Whole tensors out of pieces: the inverse of how tensor parallel layers and optimizers cut them."""

from __future__ import annotations

import numpy
import pytest

from megatron.training.verify.tensors import Piece, assemble


def pieces(whole: numpy.ndarray, dim: int, size: int, stride: int = 1, owners: int = 1) -> list[Piece]:
    """What `size` tensor parallel ranks hold, each shard's elements spread over `owners` ranks."""
    found = []
    for rank in range(size):
        if dim < 0:
            shard = whole
        else:
            parts = numpy.split(whole, stride * size, axis=dim)
            shard = numpy.concatenate(parts[rank::size], axis=dim)
        flat = shard.reshape(-1)
        borders = numpy.linspace(0, flat.size, owners + 1).astype(int)
        found += [
            Piece("w", flat[a:b].copy(), int(a), shard.shape, dim, stride, rank, size)
            for a, b in zip(borders, borders[1:])
        ]
    return found


@pytest.mark.parametrize("owners", [1, 3])
@pytest.mark.parametrize(
    ("dim", "size", "stride"), [(-1, 1, 1), (-1, 4, 1), (0, 2, 1), (1, 4, 1), (0, 2, 2), (0, 4, 2)]
)
def test_assembles_what_was_cut(dim: int, size: int, stride: int, owners: int) -> None:
    whole = numpy.arange(8 * 12, dtype=numpy.float32).reshape(8, 12)
    found = assemble(pieces(whole, dim, size, stride, owners))
    numpy.testing.assert_array_equal(found.tensors["w"], whole)
    assert found.disagreement[0] == 0.0
    assert not found.missing


def test_copies_that_differ_are_found() -> None:
    whole = numpy.ones((4, 4))
    one, other = pieces(whole, -1, 2)
    other.values[5] += 1e-9
    found = assemble([one, other])
    assert found.disagreement == (pytest.approx(1e-9), "w")


def test_elements_that_nobody_holds_are_missing() -> None:
    whole = numpy.ones((4, 4))
    assert assemble(pieces(whole, 0, 2, owners=2)[:-1]).missing == ["w"]
    assert assemble(pieces(whole, 0, 4)[1:]).missing == ["w"]


def test_not_a_number_counts_as_missing() -> None:
    whole = numpy.ones((4, 4))
    whole[2, 2] = numpy.nan
    assert assemble(pieces(whole, 0, 2)).missing == ["w"]
