"""The norm of a mixer's output. s sequence, b microbatch, g groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.fusions.fused_rms_norm import rms_norm
from megatron.core.ssm.sharding import sharded_parameter
from megatron.core.transformer.transformer_config import TransformerConfig


class GatedRMSNorm(nn.Module):
    """RMSNorm of y silu(z) in each group of channels, or silu(z) times the norm of y; cut by groups over the tensor
    parallel ranks, which exchange nothing.

    Args:
        width: channels of all ranks.
        num_groups: groups of this rank.
        norm_before_gate: normalise y alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        num_groups: int,
        *,
        eps: float,
        norm_before_gate: bool,
        tp_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.num_groups, self.eps, self.norm_before_gate = num_groups, eps, norm_before_gate
        self.weight = sharded_parameter((width,), config, nn.init.ones_, tp_group)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[s, b, channels of this rank]."""
        gate = nn.functional.silu(z)
        return self._normed(y) * gate if self.norm_before_gate else self._normed(y * gate)

    def _normed(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.num_groups, -1))
        ones = torch.ones(grouped.size(-1), dtype=self.weight.dtype, device=x.device)
        return rms_norm(grouped, ones, self.eps).flatten(-2) * self.weight
