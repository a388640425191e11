"""Output layer and loss in pieces of the vocabulary against both of torch's, gradients and shards too."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core import parallel_state
from megatron.core.fusions import linear_cross_entropy as module
from megatron.core.fusions.linear_cross_entropy import linear_cross_entropy
from tests.worker_pool import run_ranks

S, B, H, V = 6, 3, 8, 32


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden states, weight, targets of the first 20 ids, weights of the tokens)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(S, B, H, generator=generator), 2 * torch.randn(V, H, generator=generator)
    return x, weight, torch.randint(0, 20, (S, B), generator=generator), torch.randn(S, B, generator=generator)


def reference(x: Tensor, weight: Tensor, target: Tensor, factor: Tensor, true_vocab: int) -> tuple[Tensor, ...]:
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ weight.t())[..., :true_vocab].flatten(0, 1)
    loss = F.cross_entropy(logits, target.flatten(), reduction="none").view(S, B)
    (loss * factor.double()).sum().backward()
    return loss.detach(), x.grad, weight.grad


def check(tp: int, sequence_parallel: bool, dtype: torch.dtype, true_vocab: int, accumulate: bool) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    rank = parallel_state.get_tensor_model_parallel_rank()
    x, weight, target, factor = problem()
    x, weight = x.to(dtype), weight.to(dtype)
    expected, dx, dw = reference(x, weight, target, factor, true_vocab)
    leaf = (x.chunk(tp, 0)[rank] if sequence_parallel else x).clone().requires_grad_()
    shard = weight.chunk(tp, 0)[rank].clone().requires_grad_()
    if accumulate:
        shard.main_grad = torch.ones(shard.shape)
    most = S * B - 7
    with patch.dict(module.PIECE_ELEMENTS, cpu=5 * most), patch.object(module, "MOST_TOKENS", most):
        loss = linear_cross_entropy(
            leaf,
            shard,
            target,
            vocab_size=true_vocab,
            sequence_parallel=sequence_parallel,
            gradient_accumulation_fusion=accumulate,
        )
        assert loss.dtype == torch.float32
        (loss * factor).sum().backward()
    found_dw = shard.main_grad - 1 if accumulate else shard.grad
    assert not accumulate or shard.grad is None
    rounding = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), expected, **rounding)
    torch.testing.assert_close(leaf.grad.double(), dx.chunk(tp, 0)[rank] if sequence_parallel else dx, **rounding)
    torch.testing.assert_close(found_dw.double(), dw.chunk(tp, 0)[rank], **rounding)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "dtype", "true_vocab", "accumulate"),
    [
        (1, False, torch.float32, V, True),
        (1, False, torch.bfloat16, V - 3, True),
        (2, False, torch.float32, V - 3, True),
        (2, True, torch.float32, 20, False),
        (2, True, torch.bfloat16, V, True),
        (4, True, torch.float32, 20, True),  # nothing but padding on the last rank
    ],
)
def test_matches_torch(tp: int, sequence_parallel: bool, dtype: torch.dtype, true_vocab: int, accumulate: bool) -> None:
    run_ranks(tp, check, tp, sequence_parallel and S % tp == 0, dtype, true_vocab, accumulate)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that an operation inside allocates."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_no_tensor_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, target, factor = problem()
    weight.main_grad = torch.zeros(V, H)
    results = []
    for columns in (1, 5, V):
        monkeypatch.setitem(module.PIECE_ELEMENTS, "cpu", columns * S * B)
        leaf, weight.main_grad = x.clone().requires_grad_(), torch.zeros(V, H)
        with LargestResult() as sizes:
            loss = linear_cross_entropy(leaf, weight.requires_grad_(), target, gradient_accumulation_fusion=True)
            (loss * factor).sum().backward()
        assert sizes.largest == max(columns * S * B, V * H, S * B * H)
        results.append((loss.detach(), leaf.grad, weight.main_grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, target, _ = problem()
    leaf = x.requires_grad_()
    linear_cross_entropy(leaf, weight, target).sum().backward()
    assert weight.grad is None and leaf.grad is not None
