"""A layer of a hybrid stack that is a feed-forward block, or a mixture of experts, alone."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer


class MLPLayer(TransformerLayer):
    """x + mlp(norm(x)): a transformer layer whose spec has no attention, which then costs nothing."""
