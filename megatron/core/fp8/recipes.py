"""The ways of scaling, as data (Micikevicius et al., arXiv:2209.05433, sections 3 and 4.2; blocks: DeepSeek-V3,
arXiv:2412.19437, section 3.3; mxfp8: OCP Microscaling Formats 1.0, section 5).

m rows, k the dimension over which a product sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.core.transformer.transformer_config import TransformerConfig

Block = tuple[int, int]


@dataclass(frozen=True)
class Scaling:
    """Which elements of an operand [m, k] share a scale, and what scales there are."""

    activations: Block | None
    """Rows and columns of a block of x or dy; None is the whole tensor."""
    weights: Block | None
    power_of_two: bool
    """Scales are powers of two (e8m0), rounded up so that nothing saturates."""
    delayed: bool = False
    """Scales come from the maxima of earlier steps."""


SCALINGS: dict[str, Scaling] = {
    "tensorwise": Scaling(None, None, power_of_two=False),
    "delayed": Scaling(None, None, power_of_two=False, delayed=True),
    "blockwise": Scaling((1, 128), (128, 128), power_of_two=True),
    "mxfp8": Scaling((1, 32), (1, 32), power_of_two=True),
}
"""`fp8_recipe` -> what it means."""

GRADIENT_TYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "hybrid": torch.float8_e5m2}
"""`fp8` -> type of output gradients; everything else is e4m3."""


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model compute in fp8."""

    scaling: Scaling
    gradient_type: torch.dtype
    weight_gradients: bool
    """Also the product that gives the weights' gradients; otherwise that one keeps the operands' own type."""
    margin: int
    """Powers of two that delayed scaling leaves free above the expected maximum."""
    history: int
    """Steps whose maxima delayed scaling looks back on."""
    largest: bool
    """It takes their largest, not the last."""
    only_shards_agree: bool
    """Its maxima are shared with the ranks that hold parts of the same tensor, not with all replicas."""

    @classmethod
    def of(cls, config: TransformerConfig) -> Recipe:
        """What the fields `fp8_*` of a configuration say."""
        assert config.fp8 is not None and config.fp8_recipe is not None
        return cls(
            scaling=SCALINGS[config.fp8_recipe],
            gradient_type=GRADIENT_TYPES[config.fp8],
            weight_gradients=config.fp8_wgrad,
            margin=config.fp8_margin,
            history=config.fp8_amax_history_len,
            largest=config.fp8_amax_compute_algo == "max",
            only_shards_agree=config.tp_only_amax_red,
        )


def is_in_fp8(config: TransformerConfig, layer_number: int | None) -> bool:
    """Whether layer `layer_number` (from 1, in the whole model; None: apart from the stack) computes in fp8."""
    if config.fp8 is None:
        return False
    if layer_number is None or not config.first_last_layers_bf16:
        return True
    last = config.num_layers - config.num_layers_at_end_in_bf16
    return config.num_layers_at_start_in_bf16 < layer_number <= last
