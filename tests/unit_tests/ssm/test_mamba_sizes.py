"""Widths of a mixer and of what its ranks have of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron.core.ssm.mamba_sizes import MambaSizes


def sizes(hidden: int = 64, **changed: Any) -> MambaSizes:
    values = {"mamba_head_dim": 16, "mamba_num_groups": 4, "mamba_state_dim": 8}
    return MambaSizes.of(hidden, **(values | changed))


def test_width_follows_from_the_residual_stream_or_the_heads() -> None:
    assert (sizes().inner, sizes().heads) == (128, 8)
    assert (sizes(mamba_num_heads=12).inner, sizes(mamba_num_heads=12).heads) == (192, 12)
    assert sizes().parts_of_projection == (128, 128, 32, 32, 8)


def test_share_of_a_tensor_parallel_rank() -> None:
    assert sizes().over_tensor_ranks(4) == MambaSizes(32, 2, 16, 1, 8)


def test_context_parallel_ranks_share_heads_and_copy_groups() -> None:
    sizes().require_context_ranks(8)  # two ranks to a group
    sizes(mamba_num_groups=1).require_context_ranks(4)
    sizes(mamba_num_groups=8).require_context_ranks(4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mamba_head_dim": 24}, "128 must be divisible by mamba_head_dim (24); 8, 16 or 32 would do"),
        ({"mamba_head_dim": 0}, "mamba_head_dim (0) must be positive"),
        ({"mamba_num_groups": 3}, "must be divisible by mamba_num_groups (3); 1, 2 or 4 would do"),
        ({"mamba_num_heads": 6}, "the 6 heads of a mixer (mamba_num_heads) must be divisible by mamba_num_groups (4)"),
        ({"mamba_num_heads": 0}, "mamba_num_heads (0) must be positive"),
        ({"mamba_state_dim": -1}, "mamba_state_dim (-1) must be positive"),
    ],
)
def test_misfits(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sizes(**changed)


def test_misfits_of_ranks() -> None:
    with pytest.raises(ValueError, match=re.escape("mamba_num_groups 4 1, 2 or 4 would do")):
        sizes().over_tensor_ranks(8)
    with pytest.raises(ValueError, match=r"the 12 heads in 4 groups .* context_parallel_size \(3\) .*1, 2, 4 or 12"):
        sizes(mamba_num_heads=12).require_context_ranks(3)
