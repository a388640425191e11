"""How context parallel ranks may exchange keys and values, and what each way demands of the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron.core.config_rules import require, shown

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")


def comm_type_of(name: str | None) -> str:
    """The way that `name` means: `allgather` is another spelling, None is "p2p".

    Raises:
        ValueError: there is no such way.
    """
    found = {None: "p2p", "allgather": "all_gather"}.get(name, name)
    require(found in CP_COMM_TYPES, f"cp_comm_type {name!r} is unknown; it can be {', '.join(CP_COMM_TYPES)}")
    assert found is not None
    return found


def comm_types_in_use(config: TransformerConfig) -> set[str]:
    """The ways of all layers."""
    chosen = config.cp_comm_type
    return {comm_type_of(name) for name in (chosen if isinstance(chosen, list) else [chosen])}


def require_valid_cp_comm_type(config: TransformerConfig) -> None:
    """Layers may differ in how they exchange keys and values, but each needs its own entry then."""
    chosen = config.cp_comm_type
    comm_types_in_use(config)
    if config.context_parallel_size > 1 and isinstance(chosen, list):
        require(
            len(chosen) == config.num_layers,
            f"cp_comm_type lists {len(chosen)} layers, {shown(config, 'num_layers')}: give one way for all layers or "
            f"{config.num_layers}, one for each",
        )


def require_nested_groups_fit(config: TransformerConfig) -> None:
    """The scheme of two levels needs the sizes of both: within the inner heads are exchanged, along the outer keys."""
    if config.context_parallel_size == 1 or "a2a+p2p" not in comm_types_in_use(config):
        return
    sizes, cp = config.hierarchical_context_parallel_sizes, config.context_parallel_size
    pairs = [[inner, cp // inner] for inner in range(2, cp) if cp % inner == 0] or [[cp, 1]]
    require(
        sizes is not None and len(sizes) == 2 and math.prod(sizes) == cp,
        f"cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes of two levels that multiply to "
        f"context_parallel_size ({cp}), found {sizes}; possible are {' or '.join(map(str, pairs))}",
    )


def require_heads_for_all_to_all(config: TransformerConfig) -> None:
    """Where heads are exchanged for tokens, each rank must get as many. (Keys of fewer groups are repeated.)"""
    if config.context_parallel_size == 1:
        return
    heads, ways = config.num_attention_heads // config.tensor_model_parallel_size, comm_types_in_use(config)
    cp, nested = config.context_parallel_size, config.hierarchical_context_parallel_sizes
    for way, ranks in (("a2a", cp), ("a2a+p2p", nested[0] if nested else 1)):
        working = [size for size in range(1, ranks + 1) if heads % size == 0 and cp % size == 0]
        require(
            way not in ways or heads % ranks == 0,
            f"cp_comm_type {way} shares the {heads} attention heads of a tensor parallel rank among {ranks} context "
            f"parallel ranks: {heads} must be divisible by {ranks}; with these heads {working} would do "
            "(a2a+p2p takes it as its inner level), and p2p and all_gather take any number",
        )


CONTEXT_PARALLEL_RULES = (require_valid_cp_comm_type, require_nested_groups_fit, require_heads_for_all_to_all)
