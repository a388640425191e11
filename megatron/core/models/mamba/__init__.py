"""Language models of state space layers, and hybrids of these with attention."""

from __future__ import annotations

from megatron.core.models.mamba.mamba_model import MambaModel

__all__ = ["MambaModel"]
