"""State space layers (Mamba-2) and stacks that mix them with attention and feed-forward blocks."""

from __future__ import annotations

from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

__all__ = [
    "MambaLayer",
    "MambaLayerSubmodules",
    "MambaMixer",
    "MambaMixerSubmodules",
    "MambaStack",
    "MambaStackSubmodules",
]
