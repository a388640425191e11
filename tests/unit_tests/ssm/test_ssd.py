"""The chunked scan against the recurrence that it computes, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.ssm.ssd import chunked_scan, step

S, B, H, P, G, N = 23, 2, 6, 5, 2, 7


def inputs(length: int = S, dtype: torch.dtype = torch.float64, shift: float = -2.0) -> list[Tensor]:
    """x, dt, A, B, C that want gradients."""
    torch.manual_seed(0)
    x, b, c = (torch.randn(length, B, *tail, dtype=dtype) for tail in ((H, P), (G, N), (G, N)))
    dt = torch.nn.functional.softplus(torch.randn(length, B, H, dtype=dtype) + shift)
    rates = -torch.exp(2.7 * torch.rand(H, dtype=dtype))
    return [part.requires_grad_() for part in (x, dt, rates, b, c)]


def recurrence(x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: H_t = exp(dt A) H_{t-1} + dt x Bᵀ, y_t = H_t C."""
    state, outputs = x.new_zeros(B, H, P, N), []
    for t in range(x.size(0)):
        heads = [group for group in range(G) for _ in range(H // G)]
        decay = torch.exp(dt[t] * rates)[:, :, None, None]
        state = decay * state + (dt[t][:, :, None] * x[t])[..., None] * b[t][:, heads][:, :, None, :]
        outputs.append((state * c[t][:, heads][:, :, None, :]).sum(-1))
    return torch.stack(outputs), state


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 22, 23, 128])
def test_any_chunk_size_gives_the_recurrence_and_its_gradients(size: int, recompute: bool) -> None:
    ours = inputs()
    y, state = chunked_scan(*ours, size, recompute=recompute)
    expected, final = recurrence(*ours)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((out * weights).sum(), ours) for out in (y, expected))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)
    for gradient, right in zip(found, wanted):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-10)


def test_a_group_for_each_head() -> None:
    x, dt, rates, b, c = inputs()
    one_each = [x[:, :, :G], dt[:, :, :G], rates[:G], b, c]
    per_group = H // G  # of the recurrence, which is of H heads: the first of each group
    expected, _ = recurrence(
        *(part.repeat_interleave(per_group, 2) for part in one_each[:2]), rates[:G].repeat_interleave(per_group), b, c
    )
    torch.testing.assert_close(chunked_scan(*one_each, 8)[0], expected[:, :, ::per_group], rtol=0, atol=1e-10)


def test_many_blocks_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes some chunks at a time."""
    whole = chunked_scan(*inputs(), 4)[0]
    monkeypatch.setattr("megatron.core.ssm.ssd.BLOCK_ELEMENTS", 2 * B * H * 16)
    torch.testing.assert_close(chunked_scan(*inputs(), 4)[0], whole, rtol=0, atol=1e-12)


def test_steps_go_on_where_the_scan_ended() -> None:
    x, dt, rates, b, c = (part.detach() for part in inputs())
    expected, _ = chunked_scan(x, dt, rates, b, c, 8)
    _, state = chunked_scan(x[:9], dt[:9], rates, b[:9], c[:9], 8)
    for t in range(9, S):
        y = step(x[t], dt[t], rates, b[t], c[t], state)
        torch.testing.assert_close(y, expected[t], rtol=0, atol=1e-12)


def test_fp32_stays_near_fp64_when_states_fade_fast() -> None:
    """Large steps: exponents of some hundreds within a chunk, which must neither overflow nor spoil gradients."""
    narrow = inputs(200, torch.float32, shift=3.0)
    wide = [part.detach().double().requires_grad_() for part in narrow]
    outputs = [chunked_scan(*parts, 128)[0] for parts in (narrow, wide)]
    gradients = [torch.autograd.grad(y.square().sum(), parts) for y, parts in zip(outputs, (narrow, wide))]
    for found, wanted in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1])):
        # 1e-5 is what exponents of some hundreds lose in fp32; a cancellation of a token with itself loses 1e-3.
        assert torch.linalg.vector_norm(found - wanted) < 1e-4 * torch.linalg.vector_norm(wanted)
