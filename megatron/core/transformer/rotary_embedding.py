"""Angles of rotary positions (RoFormer, arXiv:2104.09864), also of positions with several coordinates.

s sequence, b microbatch, r rotated channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import default_process_groups, has_default_process_groups
from megatron.core.transformer.rotary import get_pos_emb_on_this_cp_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """[dim/2] fp32 on the CPU: base^(-2i/dim), radians per position."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


def scale_frequencies(
    inv_freq: Tensor, factor: float, low: float = 1.0, high: float = 4.0, original_length: int = 8192
) -> Tensor:
    """Llama 3.1's long-context frequencies: slow ones are divided by `factor`, fast ones kept, with a ramp
    between.

    A frequency is slow when its wavelength exceeds original_length / low, fast when it is below
    original_length / high.
    """
    wavelength = 2 * math.pi / inv_freq
    smooth = ((original_length / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def repeated_angles(angles: Tensor, interleaved: bool) -> Tensor:
    """[..., r/2] -> [..., r]: each angle twice, the whole row behind itself or each next to itself."""
    if interleaved:
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat((angles, angles), dim=-1)


class RotaryEmbedding(nn.Module):
    """Angles position * base^(-2i/r) for r = kv_channels * rotary_percent channels; tables are kept per
    length.

    Args:
        kv_channels: width of a head.
        rotary_percent: share of its channels that rotate.
        rotary_interleaved: neighbouring channels form a pair, instead of the halves of a head.
        seq_len_interpolation_factor: positions are divided by this (arXiv:2306.15595).
        rope_scaling: Llama 3.1's scaling of frequencies, by `rope_scaling_factor`.
        use_cpu_initialization: kept for the public interface; frequencies are always computed on the CPU, so
            that they are the same on every device.
        cp_group: context parallel group over which the sequence is cut.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        use_cpu_initialization: bool = False,
        cp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.dim = int(kv_channels * rotary_percent)
        self.rotary_interleaved = rotary_interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        inv_freq = inverse_frequencies(self.dim, rotary_base)
        if rope_scaling:
            inv_freq = scale_frequencies(inv_freq, rope_scaling_factor)
        # A plain attribute: neither a checkpoint nor a cast to half precision should touch it.
        self.inv_freq = inv_freq.to(device.current_device())
        if cp_group is None and has_default_process_groups():
            cp_group = default_process_groups().cp
        self.cp_group = cp_group
        self._tables: dict[tuple[int, int, bool], Tensor] = {}

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, r/2] of positions offset, offset + 1, ..."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        return torch.outer(positions, self.inv_freq)

    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, [max_seq_len, r/2] each."""
        angles = self.get_freqs_non_repeated(max_seq_len, offset)
        return angles.cos(), angles.sin()

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> Tensor:
        """Angles [s, 1, 1, r] fp32; under context parallelism those of this rank's positions, [s/cp, 1, 1,
        r].

        Args:
            packed_seq: positions of packed sequences are picked later, so the table stays whole.
        """
        key = (max_seq_len, offset, packed_seq)
        if key not in self._tables:
            self._tables[key] = self._compute(*key)
        return self._tables[key]

    @torch.no_grad()
    def _compute(self, max_seq_len: int, offset: int, packed_seq: bool) -> Tensor:
        angles = repeated_angles(self.get_freqs_non_repeated(max_seq_len, offset), self.rotary_interleaved)
        table = angles[:, None, None, :]
        return table if packed_seq else get_pos_emb_on_this_cp_rank(table, 0, self.cp_group)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: nn.Module,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        inference_params: Any = None,
    ) -> int:
        """Length of the whole sequence, whatever part of it this rank holds."""
        if getattr(transformer, "input_tensor", None) is not None:
            length = transformer.input_tensor.size(0)  # type: ignore[operator]
        else:
            assert transformer_input is not None
            length = transformer_input.size(0)
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length * get_pg_size(self.cp_group)


class MultimodalRotaryEmbedding(nn.Module):
    """Angles of positions that have several coordinates, such as time, height and width (arXiv:2409.12191,
    section 2.1).

    Arguments as of `RotaryEmbedding`.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
    ) -> None:
        super().__init__()
        self.dim = int(kv_channels * rotary_percent)
        self.rotary_interleaved = rotary_interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.inv_freq = inverse_frequencies(self.dim, rotary_base).to(device.current_device())

    def forward(self, position_ids: Tensor, mrope_section: list[int]) -> Tensor:
        """Angles [s, b, 1, r].

        Args:
            position_ids: [3, b, s], the coordinates of each token.
            mrope_section: number of angles that follow each coordinate; they add up to r/2.

        Raises:
            ValueError: they do not.
        """
        if sum(mrope_section) != self.dim // 2:
            raise ValueError(
                f"mrope_section {mrope_section} must add up to {self.dim // 2}, half of the rotated channels"
            )
        positions = position_ids.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        angles = repeated_angles(positions.unsqueeze(-1) * self.inv_freq, self.rotary_interleaved)  # [3, b, s, r]
        blocks = angles.split(mrope_section * 2, dim=-1)
        chosen = torch.cat([block[i % 3] for i, block in enumerate(blocks)], dim=-1)  # [b, s, r]
        return chosen.transpose(0, 1).unsqueeze(2)
