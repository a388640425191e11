"""The cross entropy that reuses the memory of the logits, against torch's own, gradients and shards too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.fusions import fused_cross_entropy
from megatron.core.fusions.fused_cross_entropy import (
    calculate_cross_entropy_loss,
    calculate_gradients,
    calculate_logits_max,
    calculate_predicted_logits,
    fused_vocab_parallel_cross_entropy,
)
from tests.worker_pool import run_ranks

S, B, V = 5, 2, 16


def problem(true_vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(S, B, V, generator=generator)
    target = torch.randint(0, true_vocab, (S, B), generator=generator)
    return logits, target, torch.randn(S, B, generator=generator)


def reference(logits: Tensor, target: Tensor, weight: Tensor, true_vocab: int) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf[..., :true_vocab].flatten(0, 1), target.flatten(), reduction="none").view(S, B)
    (loss * weight.double()).sum().backward()
    return loss.float(), leaf.grad


def check(tp: int, dtype: torch.dtype, true_vocab: int) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    rank = parallel_state.get_tensor_model_parallel_rank()
    logits, target, weight = problem(true_vocab)
    logits = logits.to(dtype)
    expected, expected_grad = reference(logits, target, weight, true_vocab)
    leaf = logits.chunk(tp, -1)[rank].clone().requires_grad_()
    loss = fused_vocab_parallel_cross_entropy(leaf * 1, target, vocab_size=true_vocab)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (loss * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected_grad.to(dtype).chunk(tp, -1)[rank])


@pytest.mark.parametrize("true_vocab", [V, V - 3, V // 2 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2])
def test_matches_torch(tp: int, dtype: torch.dtype, true_vocab: int) -> None:
    run_ranks(tp, check, tp, dtype, true_vocab)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, weight = problem(V)
    results = []
    for elements in (1, 3 * V, 1 << 20):
        monkeypatch.setattr(fused_cross_entropy, "CHUNK_ELEMENTS", elements)
        leaf = logits.clone().requires_grad_()
        loss = fused_vocab_parallel_cross_entropy(leaf * 1, target)
        (loss * weight).sum().backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_the_logits_memory_becomes_the_gradient() -> None:
    logits, target, _ = problem(V)
    leaf = logits.clone().requires_grad_()
    activation = leaf * 1
    addresses = []
    activation.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    loss = fused_vocab_parallel_cross_entropy(activation, target)
    loss.sum().backward(retain_graph=True)
    assert addresses == [activation.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_public_steps() -> None:
    logits, target, weight = problem(V)
    expected, expected_grad = reference(logits, target, weight, V)
    wide, maximum = calculate_logits_max(logits.clone())
    elsewhere, local_target, sums, exponentials = calculate_predicted_logits(wide, target, maximum, 0, V)
    probabilities, loss = calculate_cross_entropy_loss(exponentials, sums)
    torch.testing.assert_close(loss, expected)
    grad = calculate_gradients(probabilities, weight, elsewhere, local_target)
    torch.testing.assert_close(grad, expected_grad.float())
