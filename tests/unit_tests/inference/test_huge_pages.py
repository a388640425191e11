"""Asking for huge pages changes no number, and is no error where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.core.inference import huge_pages
from megatron.core.inference.huge_pages import PAGE, put_into_huge_pages
from megatron.core.tensor_parallel.stored_weight import PackedWeight, can_pack


@pytest.mark.parametrize("numel", [0, 1, PAGE // 8 + 3, 5 * PAGE // 4])
def test_contents_and_address_stay(numel: int) -> None:
    tensor = torch.arange(numel, dtype=torch.float32)
    address, expected = tensor.data_ptr(), tensor.clone()
    put_into_huge_pages(tensor)
    assert tensor.data_ptr() == address and torch.equal(tensor, expected)


def test_a_packed_weight_stays() -> None:
    weight = torch.randn(1024, 1024)
    if not can_pack(weight):
        pytest.skip("oneDNN packs nothing here")
    packed, x = PackedWeight(weight), torch.randn(3, 1024)
    expected = packed.multiply(x)
    put_into_huge_pages(packed.packed)
    assert torch.equal(packed.multiply(x), expected)


@pytest.mark.parametrize("setting", [None, "always madvise [never]"])
def test_nobody_is_asked_where_there_are_none(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(huge_pages, "SETTING", path)
    huge_pages._madvise.cache_clear()
    try:
        put_into_huge_pages(torch.zeros(PAGE))
        assert huge_pages._madvise() is None
    finally:
        huge_pages._madvise.cache_clear()
