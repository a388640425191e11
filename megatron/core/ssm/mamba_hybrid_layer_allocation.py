"""Which layer of a hybrid stack is of which kind (Waleffe et al., arXiv:2406.07887): arithmetic only."""

from __future__ import annotations

from collections import Counter

from megatron.core.config_rules import require


class Symbols:
    """The letters of a pattern, one for each layer."""

    MAMBA = "M"
    ATTENTION = "*"
    MLP = "-"
    MOE = "E"
    """A mixture of experts instead of a dense feed-forward block."""
    VALID = (MAMBA, ATTENTION, MLP, MOE)


KINDS = {
    Symbols.MAMBA: "state space",
    Symbols.ATTENTION: "attention",
    Symbols.MLP: "feed-forward",
    Symbols.MOE: "mixture of experts",
}


def allocate_layers(
    total_layers_count: int,
    target_attention_ratio: float = 0.0,
    target_mlp_ratio: float = 0.0,
    override_pattern: str | None = None,
) -> list[str]:
    """The symbol of each layer.

    Attention layers are spread evenly with state space layers at both ends, feed-forward layers evenly over what is
    left; their numbers are the rounded shares of all layers. A pattern says it outright; with ratios beside it, it must
    have as many of each kind.

    Raises:
        ValueError: a ratio is no share, the ratios exceed 1 together, or the pattern does not fit.
    """
    automatic = _spread(total_layers_count, *_counts(total_layers_count, target_attention_ratio, target_mlp_ratio))
    if override_pattern is None:
        return automatic
    pattern = _checked(override_pattern, total_layers_count, automatic)
    if target_attention_ratio > 0 or target_mlp_ratio > 0:
        _require_equal_counts(pattern, automatic, target_attention_ratio, target_mlp_ratio)
    return pattern


def _counts(layers: int, attention_ratio: float, mlp_ratio: float) -> tuple[int, int]:
    """How many layers the ratios stand for."""
    for name, ratio in (("hybrid_attention_ratio", attention_ratio), ("hybrid_mlp_ratio", mlp_ratio)):
        require(
            0.0 <= ratio <= 1.0,
            f"{name} ({ratio}) is a share of all layers, from 0 to 1; for n of {layers} layers give n/{layers}",
        )
    require(
        attention_ratio + mlp_ratio <= 1.0,
        f"hybrid_attention_ratio ({attention_ratio}) and hybrid_mlp_ratio ({mlp_ratio}) are more than 1 together; "
        f"with the first, hybrid_mlp_ratio can be at most {1 - attention_ratio:g}",
    )
    return round(layers * attention_ratio), round(layers * mlp_ratio)


def _spread(layers: int, num_attention: int, num_mlp: int) -> list[str]:
    kinds = [Symbols.MAMBA] * layers
    _place(kinds, Symbols.ATTENTION, num_attention, num_attention + 1)
    _place(kinds, Symbols.MLP, num_mlp, num_mlp)
    return kinds


def _place(kinds: list[str], symbol: str, count: int, sections: int) -> None:
    """Turn `count` state space layers into others, with equal sections of the rest between them."""
    if not count:
        return
    section = (kinds.count(Symbols.MAMBA) - count) / sections
    left = section
    for i, kind in enumerate(kinds):
        if kind != Symbols.MAMBA:
            continue
        if left < 0.5:
            kinds[i] = symbol
            left += section
        else:
            left -= 1


def _checked(pattern: str, layers: int, automatic: list[str]) -> list[str]:
    unknown = sorted(set(pattern) - set(Symbols.VALID))
    legend = ", ".join(f"{symbol} {kind}" for symbol, kind in KINDS.items())
    require(
        not unknown, f"hybrid_override_pattern {pattern!r} has {', '.join(map(repr, unknown))}; it is made of {legend}"
    )
    require(
        len(pattern) == layers,
        f"hybrid_override_pattern {pattern!r} has {len(pattern)} symbols for num_layers ({layers}); "
        f"{''.join(_fitted(pattern, layers, automatic))!r} has as many, or set num_layers to {len(pattern)}",
    )
    return list(pattern)


def _fitted(pattern: str, layers: int, automatic: list[str]) -> list[str]:
    """The pattern cut or repeated to the right length."""
    return list((pattern * (layers // len(pattern) + 1))[:layers]) if pattern else automatic


def _require_equal_counts(pattern: list[str], automatic: list[str], attention_ratio: float, mlp_ratio: float) -> None:
    found, wanted = Counter(pattern), Counter(automatic)
    found[Symbols.MLP] += found.pop(Symbols.MOE, 0)
    differing = [
        f"{found[symbol]} {kind} layers instead of {wanted[symbol]}"
        for symbol, kind in KINDS.items()
        if symbol != Symbols.MOE and found[symbol] != wanted[symbol]
    ]
    require(
        not differing,
        f"hybrid_override_pattern {''.join(pattern)!r} has {', '.join(differing)} of hybrid_attention_ratio "
        f"({attention_ratio}) and hybrid_mlp_ratio ({mlp_ratio}): leave the ratios out, or take "
        f"{''.join(automatic)!r}, which they give",
    )
