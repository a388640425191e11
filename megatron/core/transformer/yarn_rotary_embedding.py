"""YaRN: rotary positions stretched to longer contexts, fast channels less than slow ones (arXiv:2309.00071,
section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.transformer.rotary import yarn_mscale
from megatron.core.transformer.rotary_embedding import RotaryEmbedding, inverse_frequencies


def yarn_correction_dim(rotations: float, dim: int, base: float, original_length: int) -> float:
    """The channel pair (a real number) that turns `rotations` times over the original context."""
    return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))


def yarn_correction_range(
    beta_fast: float, beta_slow: float, dim: int, base: float, original_length: int
) -> tuple[int, int]:
    """Pairs (low, high): up to low frequencies are kept, from high on they are divided by the scaling
    factor."""
    low = math.floor(yarn_correction_dim(beta_fast, dim, base, original_length))
    high = math.ceil(yarn_correction_dim(beta_slow, dim, base, original_length))
    return max(low, 0), min(high, dim - 1)


def yarn_ramp(low: float, high: float, count: int) -> Tensor:
    """[count] fp32 on the CPU, 0 up to `low`, 1 from `high`, linear between."""
    if low == high:
        high += 0.001
    return ((torch.arange(count, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)


class YarnRotaryEmbedding(RotaryEmbedding):
    """Angles with YaRN's frequencies, and the factor `mscale` on cos and sin.

    Args:
        scaling_factor: how many times longer the context may become.
        original_max_position_embeddings: context length of the training that is stretched.
        beta_fast: pairs that turn more often than this over the original context are kept.
        beta_slow: pairs that turn less often than this are interpolated fully.
        mscale: strength of the temperature, relative to that of `mscale_all_dim`.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000.0,
        use_cpu_initialization: bool = False,
        scaling_factor: float = 1.0,
        original_max_position_embeddings: int = 4096,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float = 1.0,
        mscale_all_dim: float = 0.0,
        cp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            kv_channels,
            rotary_percent,
            rotary_interleaved=rotary_interleaved,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            rotary_base=rotary_base,
            use_cpu_initialization=use_cpu_initialization,
            cp_group=cp_group,
        )
        low, high = yarn_correction_range(beta_fast, beta_slow, self.dim, rotary_base, original_max_position_embeddings)
        kept = inverse_frequencies(self.dim, rotary_base)
        ramp = yarn_ramp(low, high, self.dim // 2)
        self.inv_freq = (kept / scaling_factor * ramp + kept * (1 - ramp)).to(self.inv_freq.device)
        self.mscale = yarn_mscale(scaling_factor, mscale) / yarn_mscale(scaling_factor, mscale_all_dim)
        self._cos_sin: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> tuple[Tensor, float]:  # type: ignore[override]
        """(angles [s, 1, 1, r] fp32, mscale)."""
        return super().forward(max_seq_len, offset, packed_seq), self.mscale

    def get_cached_cos_sin(
        self, seq_len: int, offset: int = 0, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin times `mscale`, [s, 1, 1, r] each, of type `dtype` (torch's default if None)."""
        dtype = dtype or torch.get_default_dtype()
        if (seq_len, offset, dtype) not in self._cos_sin:
            angles, mscale = self.forward(seq_len, offset)
            self._cos_sin[seq_len, offset, dtype] = (
                (angles.cos() * mscale).to(dtype),
                (angles.sin() * mscale).to(dtype),
            )
        return self._cos_sin[seq_len, offset, dtype]
