"""Attention by blocks of queries against torch's explicit formula in fp64, gradients too."""

from __future__ import annotations

import pytest
import torch

from megatron.core.fusions import blocked_attention
from megatron.core.fusions.blocked_attention import Rules, suits_blocks
from megatron.core.fusions.blocked_attention import blocked_attention as attention_in_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("s", [16, 21])
def test_matches_formula(s: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", 8)  # two whole blocks, or a last one that is cut
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, s, 8).to(dtype).requires_grad_() for heads in (4, groups, groups)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = wide
    k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
    expected = torch.softmax(scores, -1) @ v
    actual = attention_in_blocks(*inputs, Rules(0.4))
    grad = torch.randn(expected.shape).to(dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    assert actual.dtype == dtype and actual.permute(2, 0, 1, 3).is_contiguous()
    # bf16: probabilities and results have 8 bits, and gradients are sums of 21 such products
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)
    for x, wanted in zip(inputs, wide):
        torch.testing.assert_close(x.grad, wanted.grad.to(dtype), **tolerance)


def test_is_about_as_exact_as_the_kernel_of_torch_in_bf16() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 300, 32).bfloat16() for _ in range(3)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs), is_causal=True)
    kernel = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    ours = attention_in_blocks(*inputs, Rules(32**-0.5))

    def error(x: torch.Tensor) -> float:
        return (x.double() - exact).square().mean().sqrt().item()

    # The kernel rounds exponentials, of which the largest is exactly 1; we round probabilities: 16 % more error.
    assert error(ours) <= 1.25 * error(kernel)
    # In a format of 8 bits the exact result itself, rounded, is off by about as much.
    assert error(ours) <= 2 * error(exact.bfloat16())


def test_where_it_is_used() -> None:
    def suits(s: int, dtype: torch.dtype = torch.float32, width: int = 8) -> bool:
        return suits_blocks(torch.empty(1, 1, s, 8, dtype=dtype), torch.empty(1, 1, s, width, dtype=dtype))

    assert suits(256) and suits(512, torch.bfloat16)
    assert not suits(128) and not suits(1024)
    assert not suits(300, torch.float16) and not suits(300, width=16)


@pytest.mark.parametrize("case", ["causal", "all", "hidden", "cross"])
def test_dropout_and_masks_match_the_formula(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", 8)
    torch.manual_seed(0)
    b, a, g, s, sk, p = 2, 4, 2, 21, 13 if case == "cross" else 21, 0.3
    hidden = torch.rand(b, 1, s, sk) < 0.4 if case in ("hidden", "cross") else None
    if hidden is not None:
        hidden[1, 0, 5] = True  # a query that sees nothing
    rules = Rules(0.4, case == "causal", hidden, p, dropout_seed=7)
    inputs = [torch.randn(b, heads, n, 8, requires_grad=True) for heads, n in ((a, s), (g, sk), (g, sk))]
    keep = torch.zeros(b * a, s, sk)
    for block in rules.blocks(inputs[0], inputs[1]):
        keep[:, block.start : block.stop, : block.seen] = block.keep
    wide = [x.detach().double().requires_grad_() for x in inputs]
    k, v = (x.repeat_interleave(a // g, dim=1) for x in wide[1:])
    scores = wide[0] @ k.transpose(-1, -2) * 0.4
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if case == "causal":
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
    expected = (torch.softmax(scores, -1).nan_to_num() * keep.view(b, a, s, sk)) @ v
    actual = attention_in_blocks(*inputs, rules)
    grad = torch.randn(expected.shape)
    actual.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    for x, wanted in zip(inputs, wide):
        torch.testing.assert_close(x.grad, wanted.grad.nan_to_num().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean(p: float) -> None:
    count = 3 * 40 * 1001
    kept = blocked_attention._kept((3, 40, 1001), p, torch.Generator().manual_seed(1))
    low, high = kept.unique().tolist()
    assert low == 0.0 and high == pytest.approx(1 / (1 - p), rel=1e-4)
    spread = (p * (1 - p) / count) ** 0.5
    assert abs((kept == 0).double().mean().item() - p) < 5 * spread + 2**-17
    neighbours = torch.corrcoef(torch.stack([kept[..., :-1].flatten(), kept[..., 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / count**0.5
    again, other = (blocked_attention._kept((3, 40, 1001), p, torch.Generator().manual_seed(n)) for n in (1, 2))
    assert torch.equal(kept, again) and not torch.equal(kept, other)
