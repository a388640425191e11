"""Both engines of the search find the same vectors, those with the largest inner product."""

from __future__ import annotations

import numpy
import pytest
import torch

from megatron.core.extensions import mips_index
from megatron.core.extensions.mips_index import FaissMIPSIndex

WIDTH, ROWS = 16, 500
ENGINES = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(mips_index._faiss is None, reason="needs faiss"))]


def vectors(rows: int, seed: int) -> numpy.ndarray:
    return numpy.random.RandomState(seed).standard_normal((rows, WIDTH)).astype(numpy.float16)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_rows_are_found(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mips_index, "_ROWS_AT_ONCE", 64)
    rows, queries = vectors(ROWS, 1), torch.from_numpy(vectors(7, 2)).bfloat16()
    index = FaissMIPSIndex(WIDTH, {1000 + i: row for i, row in enumerate(rows[:300])}, engine=engine)
    index.add_embed_data({1000 + i: row for i, row in enumerate(rows[300:], 300)})
    assert len(index) == ROWS
    scores = queries.float().numpy() @ rows.astype(numpy.float32).T
    best = numpy.argsort(-scores, axis=1)[:, :10]
    found_scores, ids = index.search_mips_index(queries, 10, reconstruct=False)
    assert (ids == 1000 + best).all()
    assert found_scores == pytest.approx(numpy.take_along_axis(scores, best, axis=1), rel=1e-5)
    assert (index.search_mips_index(queries, 10) == rows.astype(numpy.float32)[best]).all()
    index.reset_index()
    assert len(index) == 0


def test_wrong_widths_and_counts_are_refused() -> None:
    index = FaissMIPSIndex(WIDTH, dict(enumerate(vectors(5, 1))), engine="torch")
    for queries, k, message in ((vectors(2, 1), 6, "between 1 and the 5 vectors"), (vectors(2, 1)[0], 1, "expected")):
        with pytest.raises(ValueError, match=message):
            index.search_mips_index(queries, k)
    with pytest.raises(ValueError, match="embed_size 4"):
        FaissMIPSIndex(4, dict(enumerate(vectors(5, 1))))
    with pytest.raises(ValueError, match="known are faiss and torch"):
        FaissMIPSIndex(4, engine="annoy")


def test_without_the_package_torch_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mips_index, "_faiss", None)
    assert FaissMIPSIndex(WIDTH).engine == "torch"
    with pytest.raises(RuntimeError, match="pip install"):
        FaissMIPSIndex(WIDTH, engine="faiss")
