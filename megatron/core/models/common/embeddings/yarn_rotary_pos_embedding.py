"""YaRN's rotary positions, under the name of the public interface."""

from __future__ import annotations

from megatron.core.transformer.yarn_rotary_embedding import (
    YarnRotaryEmbedding,
    yarn_correction_dim,
    yarn_correction_range,
    yarn_ramp,
)

__all__ = ["YarnRotaryEmbedding", "yarn_correction_dim", "yarn_correction_range", "yarn_ramp"]
