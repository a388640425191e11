"""Rotary angles and their application: tabled values, complex-number reference, packed positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.core.models.common.embeddings import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
    YarnRotaryEmbedding,
)
from megatron.core.models.common.embeddings.rope_utils import (
    apply_rotary_pos_emb,
    get_pos_emb_on_this_cp_rank,
)
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import yarn_correction_range
from megatron.core.transformer.rotary import yarn_mscale
from megatron.core.transformer.transformer_config import TransformerConfig


def config(**kwargs: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **kwargs)


def by_complex_numbers(t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """t [s, b, a, d] as pairs of channels, multiplied by e^(i angle); angles [s, r/2], fp64."""
    width = 2 * angles.size(-1)
    head, tail = t[..., :width].double(), t[..., width:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    back = torch.view_as_real(turned)
    back = back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2)
    return torch.cat((back, tail.double()), -1)


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(interleaved: bool, percent: float, dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(8, percent, rotary_interleaved=interleaved, seq_len_interpolation_factor=2.0)
    positions = torch.arange(3, 3 + 5, dtype=torch.float64) / 2
    angles = torch.outer(positions, 10000.0 ** (-torch.arange(0, 8 * percent, 2, dtype=torch.float64) / (8 * percent)))
    t = torch.randn(5, 2, 3, 8).to(dtype).requires_grad_()
    y = apply_rotary_pos_emb(t, rope(5, offset=3), config(rotary_interleaved=interleaved))
    assert y.dtype == dtype
    expected = by_complex_numbers(t, angles, interleaved)
    torch.testing.assert_close(y, expected.to(dtype))
    grad = torch.randn(t.shape).to(dtype)
    (actual,) = torch.autograd.grad(y, t, grad)
    (wanted,) = torch.autograd.grad(expected, t, grad.double())
    torch.testing.assert_close(actual, wanted)


def test_scores_depend_on_the_distance_only() -> None:
    rope, c = RotaryEmbedding(8, 1.0), config()
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def score(i: int, j: int) -> Tensor:
        turned_q = apply_rotary_pos_emb(q, rope(1, offset=i), c)
        return (turned_q * apply_rotary_pos_emb(k, rope(1, offset=j), c)).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_llama3_scaling_table() -> None:
    found = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True).inv_freq
    table = {
        20: 1.656044e-02,
        28: 3.211446e-03,
        30: 1.371894e-03,
        32: 5.248460e-04,
        34: 1.785078e-04,
        40: 3.428102e-05,
        63: 3.068926e-07,
    }
    for index, value in table.items():
        assert found[index].item() == pytest.approx(value, rel=2e-6)


def test_yarn_table() -> None:
    assert yarn_correction_range(32, 1, 64, 1e4, 4096) == (10, 23)
    found = YarnRotaryEmbedding(64, scaling_factor=40, original_max_position_embeddings=4096).inv_freq
    for index, value in {0: 1.0, 10: 0.056234129, 16: 0.0055, 23: 3.3338e-05, 31: 3.334e-06}.items():
        assert found[index].item() == pytest.approx(value, rel=1e-4)


def test_yarn_temperature() -> None:
    assert yarn_mscale(1.0, 0.7) == 1.0
    # softmax scale of latent attention with 128 + 64 channels, from the same temperature
    assert yarn_mscale(40, 0.707) ** 2 / math.sqrt(192) == pytest.approx(0.114721, abs=1e-6)
    rope = YarnRotaryEmbedding(8, scaling_factor=40, mscale=1.0, mscale_all_dim=0.707)
    angles, mscale = rope(4)
    assert mscale == pytest.approx(yarn_mscale(40, 1.0) / yarn_mscale(40, 0.707))
    cos, sin = rope.get_cached_cos_sin(4, dtype=torch.float32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, mscale**2))
    assert rope.get_cached_cos_sin(4, dtype=torch.float32)[0] is cos and rope(4)[0] is angles


def test_tables_are_kept_and_cos_sin_agree() -> None:
    rope = RotaryEmbedding(8, 1.0)
    assert rope(6) is rope(6) and rope(6) is not rope(7)
    assert rope(6).shape == (6, 1, 1, 8) and rope(6).dtype == torch.float32
    cos, sin = rope.get_cos_sin(6)
    torch.testing.assert_close(rope(6)[:, 0, 0, :4].cos(), cos)
    torch.testing.assert_close(rope(6)[:, 0, 0, 4:].sin(), sin)
    rope.to(torch.bfloat16)
    assert rope.inv_freq.dtype == torch.float32 and not rope.state_dict()


def test_packed_sequences_count_positions_from_their_start() -> None:
    rope, c = RotaryEmbedding(8, 1.0), config()
    t = torch.randn(6, 2, 2, 8)
    starts = torch.tensor([0, 4, 6, 12], dtype=torch.int32)
    packed = apply_rotary_pos_emb(t, rope(6), c, cu_seqlens=starts)
    torch.testing.assert_close(packed[:4, 0], apply_rotary_pos_emb(t[:4, :1], rope(4), c)[:, 0])
    torch.testing.assert_close(packed[4:, 0], apply_rotary_pos_emb(t[4:, :1], rope(2), c)[:, 0])
    torch.testing.assert_close(packed[:, 1], apply_rotary_pos_emb(t[:, 1:], rope(6), c)[:, 0])
    flat = t.transpose(0, 1).flatten(0, 1)  # [n, a, d]
    same = apply_rotary_pos_emb(flat, rope(6), c, cu_seqlens=starts)
    torch.testing.assert_close(same, packed.transpose(0, 1).flatten(0, 1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_of_equal_coordinates_is_rope(interleaved: bool) -> None:
    positions = torch.arange(7).expand(3, 2, 7)
    angles = MultimodalRotaryEmbedding(16, 1.0, rotary_interleaved=interleaved)(positions, [4, 2, 2])
    assert angles.shape == (7, 2, 1, 16)
    torch.testing.assert_close(angles, RotaryEmbedding(16, 1.0, interleaved)(7).expand_as(angles))


def test_mrope_blocks_follow_their_coordinate() -> None:
    rope = MultimodalRotaryEmbedding(16, 1.0)
    positions = torch.stack([torch.full((1, 1), value) for value in (1, 10, 100)])
    angles = rope(positions, [4, 2, 2])[0, 0, 0]
    factor = torch.tensor([1.0] * 4 + [10.0] * 2 + [100.0] * 2).repeat(2)
    torch.testing.assert_close(angles, factor * rope.inv_freq.repeat(2))
    with pytest.raises(ValueError, match="add up to 8"):
        rope(positions, [4, 2])


def test_no_context_parallelism_keeps_the_table() -> None:
    table = torch.randn(4, 1, 1, 8)
    assert get_pos_emb_on_this_cp_rank(table, 0, None) is table


def test_latent_attention_sorts_even_channels_first() -> None:
    rope = RotaryEmbedding(8, 1.0)
    c = config()
    c.multi_latent_attention = True
    t = torch.randn(3, 1, 1, 8)
    y = apply_rotary_pos_emb(t, rope(3), c)
    sorted_t = torch.cat((t[..., 0::2], t[..., 1::2]), -1)
    torch.testing.assert_close(y, apply_rotary_pos_emb(sorted_t, rope(3), config()))
