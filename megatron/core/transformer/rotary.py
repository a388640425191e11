"""Rotary positions applied to queries and keys (RoFormer, arXiv:2104.09864). s sequence, b microbatch, a
heads, d head width."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.fusions.compiled import region, rotate
from megatron.core.fusions.fused_rotary import RotatePairs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.context_parallel.packed import places_in_documents
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    config: TransformerConfig,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
) -> Tensor:
    """t with its first r channels rotated by the angles of their positions.

    Args:
        t: [s, b, a, d]; with `cu_seqlens` also [n, a, d].
        freqs: angles [s, 1, 1, r], each of the r/2 given twice: by halves, or in pairs when
            `rotary_interleaved`.
        cu_seqlens: starts of packed sequences on the flattened [b, s] (or [n]) token axis; positions count
            from each.
        mscale: factor on cos and sin (YaRN's temperature).
        cp_group: context parallel group over which each packed sequence is cut in zigzag; without `cu_seqlens`
            the angles are those of t already.
    """
    if cu_seqlens is not None:
        packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens)
        if t.dim() == 3:
            angles = packed_angles(freqs, packed, t.size(0), 1, cp_group)
            return _rotate(t.unsqueeze(1), angles, config, mscale).squeeze(1)
        freqs = packed_angles(freqs, packed, t.size(0), t.size(1), cp_group)
    return _rotate(t, freqs, config, mscale)


def _rotate(t: Tensor, freqs: Tensor, config: TransformerConfig, mscale: float) -> Tensor:
    return _apply_rotary_pos_emb_bshd(
        t,
        freqs,
        rotary_interleaved=config.rotary_interleaved,
        multi_latent_attention=config.multi_latent_attention,
        mscale=mscale,
        compiled=config.torch_compile,
    )


def _apply_rotary_pos_emb_bshd(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    compiled: bool = False,
) -> Tensor:
    """t [s, b, a, d] rotated by angles [s, 1 or b, 1, r]; latent attention sorts even before odd channels
    first."""
    width = freqs.size(-1)
    angles = freqs[..., 0::2] if rotary_interleaved else freqs[..., : width // 2]
    if multi_latent_attention:
        t = torch.cat((t[..., :width:2], t[..., 1:width:2], t[..., width:]), dim=-1)
    if compiled:
        return region(rotate)(t, angles, mscale, rotary_interleaved)
    return RotatePairs.apply(t, angles.cos() * mscale, angles.sin() * mscale, rotary_interleaved)


def packed_angles(
    freqs: Tensor, packed: PackedSeqParams, s: int, b: int, cp_group: ProcessGroup | None = None
) -> Tensor:
    """[s, b, 1, r]: the angles of the s tokens of each sample that this rank of `cp_group` holds, their positions
    counted from the start of their packed sequence."""
    if get_pg_size(cp_group) > 1:
        places = places_in_documents(packed, s, b, get_pg_size(cp_group), get_pg_rank(cp_group))
        return freqs[places.to(freqs.device), 0]
    tokens = torch.arange(b * s, device=freqs.device)
    starts = packed.document_starts().to(freqs.device, torch.int64)
    sequence = torch.searchsorted(starts, tokens, right=True) - 1
    position = (tokens - starts[sequence]).view(b, s).transpose(0, 1)
    return freqs[position, 0]  # [s, b, 1, r]


def get_pos_emb_on_this_cp_rank(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup | None) -> Tensor:
    """This rank's positions: of 2 cp chunks along `seq_dim`, chunk c and chunk 2 cp - 1 - c (balanced causal
    work)."""
    size, rank = get_pg_size(cp_group), get_pg_rank(cp_group)
    chunks = pos_emb.chunk(2 * size, dim=seq_dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=seq_dim) if size > 1 else pos_emb


def yarn_mscale(scale: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature for a context `scale` times as long, 0.1 m ln(scale) + 1
    (arXiv:2309.00071, section 3.4)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def yarn_concentration(config: TransformerConfig) -> float:
    """Factor on cos and sin of the configuration's YaRN positions; 1 without YaRN."""
    factor = config.yarn_rotary_scaling_factor
    if factor is None:
        return 1.0
    return yarn_mscale(factor, config.yarn_mscale) / yarn_mscale(factor, config.yarn_mscale_all_dim)
