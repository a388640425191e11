"""Which layer is of which kind, and what cannot be one."""

from __future__ import annotations

import re

import pytest

from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers


@pytest.mark.parametrize(
    ("layers", "attention", "mlp", "expected"),
    [
        (8, 0.25, 0.25, "MM*-M*M-"),
        (12, 0.1667, 0.4, "M-M*-M-M*-M-"),
        (10, 0.1, 0.0, "MMMMM*MMMM"),
        (48, 0.08, 0.5, "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"),
        (48, 0.5, 0.0, "M*M*M*M*M*M*M*M*M*M*M*M**M*M*M*M*M*M*M*M*M*M*M*M"),
        (4, 0.0, 0.0, "MMMM"),
    ],
)
def test_ratios(layers: int, attention: float, mlp: float, expected: str) -> None:
    assert "".join(allocate_layers(layers, attention, mlp)) == expected
    assert allocate_layers(layers, attention, mlp, expected) == list(expected)


def test_counts_are_the_rounded_shares_for_all_small_stacks() -> None:
    for layers in range(1, 20):
        for attention in range(layers + 1):
            for mlp in range(layers + 1 - attention):
                kinds = allocate_layers(layers, attention / layers, mlp / layers)
                assert (kinds.count("*"), kinds.count("-"), len(kinds)) == (attention, mlp, layers)


def test_a_pattern_says_it_outright() -> None:
    assert "".join(allocate_layers(5, override_pattern="M*E-M")) == "M*E-M"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0.0, 0.0, "M*X-"), "has 'X'; it is made of M state space, * attention, - feed-forward, E mixture"),
        ((4, 0.0, 0.0, "M*-"), "has 3 symbols for num_layers (4); 'M*-M' has as many, or set num_layers to 3"),
        ((4, 0.0, 0.0, "MMMM*"), "'MMMM' has as many"),
        ((4, 0.0, 0.0, ""), "'MMMM' has as many"),
        ((4, 1.5, 0.0), "hybrid_attention_ratio (1.5) is a share of all layers, from 0 to 1"),
        ((4, 0.0, -0.1), "hybrid_mlp_ratio (-0.1) is a share"),
        ((4, 0.5, 0.75), "more than 1 together; with the first, hybrid_mlp_ratio can be at most 0.5"),
        ((4, 0.25, 0.0, "MM**"), "2 attention layers instead of 1"),
        ((4, 0.25, 0.0, "MM**"), "leave the ratios out, or take 'MM*M', which they give"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate_layers(*arguments)
