"""Recomputation that drops its output too, and what parameters get whose input needs no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.tensor_parallel.random import (
    CheckpointWithoutOutput,
    checkpoint,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)


class Half(nn.Module):
    """Norm with dropout, then two users of its output, then the residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.calls = 0

    def normed(self, x: Tensor) -> Tensor:
        self.calls += 1
        with get_cuda_rng_tracker().fork():
            return F.dropout(self.norm(x), 0.3)

    def forward(self, x: Tensor, discard: bool) -> Tensor:
        again = CheckpointWithoutOutput()
        normed = again.checkpoint(self.normed, x) if discard else self.normed(x)
        y = self.fc1(normed) * self.fc2(normed)
        if discard:
            again.discard_output_and_register_recompute(y)
            assert normed.untyped_storage().nbytes() == (0 if y.requires_grad else 4 * x.numel())
        return F.pad(x, (0, 2)) + y


def outcome(discard: bool, wrap: Callable[..., Tensor] | None = None) -> list[Tensor]:
    model_parallel_cuda_manual_seed(1234)
    half = Half()
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
    for _ in range(2):  # the second one starts from where the generators were left
        out = half(x, discard) if wrap is None else wrap(half, x, discard)
        out.square().sum().backward()
    return [out.detach(), x.grad, *(param.grad for param in half.parameters())]


def test_a_dropped_output_is_back_when_backward_needs_it() -> None:
    torch.testing.assert_close(outcome(True), outcome(False), rtol=0, atol=0)


def test_a_dropped_output_inside_recomputation() -> None:
    def recomputed(half: Half, x: Tensor, discard: bool) -> Tensor:
        return checkpoint(half, False, x, discard)

    torch.testing.assert_close(outcome(True, recomputed), outcome(False), rtol=0, atol=0)


def test_only_the_input_stays() -> None:
    half, x = Half(), torch.randn(4, 3, 6, requires_grad=True)
    model_parallel_cuda_manual_seed(1234)
    stored: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        half(x, True)
    weights = {param.untyped_storage()._cdata for param in half.parameters()}
    activations = {key: storage.nbytes() // 4 for key, storage in stored.items() if key not in weights}
    assert sorted(n for n in activations.values() if n) == [72, 96, 96]  # x, and the two factors of y


def test_without_backward_nothing_is_dropped_or_run_again() -> None:
    half, x = Half(), torch.randn(4, 3, 6, requires_grad=True)
    model_parallel_cuda_manual_seed(1234)
    with torch.no_grad():
        half(x, True)
    assert half.calls == 1


def test_an_output_that_is_kept_is_fine_too() -> None:
    x = torch.randn(5, requires_grad=True)
    CheckpointWithoutOutput().checkpoint(torch.sin, x).sum().backward()
    torch.testing.assert_close(x.grad, x.cos())


def test_an_output_in_its_inputs_memory_is_refused() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    again = CheckpointWithoutOutput()
    y = again.checkpoint(lambda x: x.view(6, 4), x) * 2
    with pytest.raises(ValueError, match="memory of its own"):
        again.discard_output_and_register_recompute(y)
    with pytest.raises(NotImplementedError, match="fp8"):
        CheckpointWithoutOutput(fp8=True)


def test_parameters_behind_an_input_without_gradient_get_theirs() -> None:
    fc, x = nn.Linear(3, 2), torch.randn(4, 3)
    checkpoint(lambda x: fc(x).square(), False, x).sum().backward()
    recomputed = fc.weight.grad
    fc.weight.grad = None
    fc(x).square().sum().backward()
    assert torch.equal(recomputed, fc.weight.grad)
    assert x.grad is None


def test_a_parameter_that_is_handed_through_stays_one() -> None:
    fc = nn.Linear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    product, bias = checkpoint(lambda x: (F.linear(x, fc.weight), fc.bias), False, x)
    (product + bias).square().sum().backward()
    found = [param.grad for param in fc.parameters()]
    assert fc.bias.is_leaf
    fc.zero_grad()
    fc(x).square().sum().backward()
    torch.testing.assert_close(found, [param.grad for param in fc.parameters()])
