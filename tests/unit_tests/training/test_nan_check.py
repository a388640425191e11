"""A loss that is not finite: the message names where that began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.training.nan_check import (
    NonFiniteLoss,
    RememberingIterator,
    checked_forward_step,
    first_nonfinite_module,
    first_nonfinite_parameter,
)


class Divide(nn.Module):
    """Infinite where `by` is zero; the index that it returns as well is always fine."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / self.by, torch.arange(3)


class Layer(nn.Module):
    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.linear, self.divide = nn.Linear(3, 3), Divide(by)

    def forward(self, x: Tensor) -> Tensor:
        return self.divide(self.linear(x))[0]


class Model(nn.Module):
    def __init__(self, second_divides_by: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(second_divides_by), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def spoil(model: nn.Module, *names: str, value: float = float("nan")) -> None:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).view(-1)[-1] = value


def test_first_bad_parameter() -> None:
    model = Model()
    assert first_nonfinite_parameter(model) is None
    spoil(model, "layers.2.linear.weight", "layers.1.linear.bias", value=float("-inf"))
    assert first_nonfinite_parameter(model) == "layers.1.linear.bias"


def test_first_bad_output_is_that_of_the_innermost_module() -> None:
    model, x = Model(second_divides_by=0.0), torch.ones(2, 3)
    assert first_nonfinite_module(model, lambda: model(x)) == "layers.1.divide"
    assert first_nonfinite_module(Model(), lambda: model(x)) is None  # nothing of that model ran
    fine = Model()
    assert first_nonfinite_module(fine, lambda: fine(x)) is None


def test_the_model_itself_is_named_by_its_class() -> None:
    model = Divide(by=0.0)
    assert first_nonfinite_module(model, lambda: model(torch.ones(2))) == "Divide"


def test_looking_leaves_the_model_as_it_was() -> None:
    model = Model(second_divides_by=0.0)
    with pytest.raises(KeyError):
        first_nonfinite_module(model, lambda: {}["fails"])
    first_nonfinite_module(model, lambda: model(torch.ones(2, 3)))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())


def mean_loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return output.sum(), torch.tensor(output.numel()), {"lm loss": output.mean()}


def forward_step(batches: Iterator[Tensor], model: nn.Module) -> Any:
    return model(next(batches)), mean_loss


def run(model: nn.Module, batches: list[Tensor], forward: Any = forward_step) -> list[Any]:
    """Loss of each batch, as a schedule computes it."""
    step, data = checked_forward_step(forward, rank=3, iteration=17), RememberingIterator(iter(batches))
    results = []
    for _ in batches:
        output, loss_function = step(data, model)
        results.append(loss_function(output))
    return results


def test_finite_losses_pass_unchanged() -> None:
    model, x = Model(), torch.ones(2, 3)
    ((loss, tokens, report),) = run(model, [x])
    assert torch.equal(loss, model(x).sum())
    assert int(tokens) == 6
    assert torch.equal(report["lm loss"], model(x).mean())


def test_a_bad_parameter_is_named() -> None:
    model = Model()
    spoil(model, "layers.1.linear.weight", "layers.2.linear.bias")
    message = (
        r"rank 3: the loss of iteration 17 is nan; the first parameter that is not finite is "
        r"layers\.1\.linear\.weight\. \(--no-check-for-nan-in-loss-and-grad continues regardless\.\)"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        run(model, [torch.ones(2, 3)])


def test_a_bad_module_is_named_though_its_batch_is_consumed() -> None:
    """Only the second batch overflows: that one must be run again."""
    model = Model()
    model.layers[1].divide.by = 1e-30
    with torch.no_grad():
        model.layers[0].linear.bias.fill_(0.0)
    overflowing = torch.full((2, 3), 3e37)
    with pytest.raises(
        NonFiniteLoss, match=r"all parameters are finite; the first output that is not comes from layers\.1\.divide"
    ):
        run(model, [torch.zeros(2, 3), overflowing])


def test_a_bad_loss_function_is_named() -> None:
    def bad_loss(output: Tensor) -> Tensor:
        return output.sum() / 0

    def forward(batches: Iterator[Tensor], model: nn.Module) -> Any:
        return model(next(batches)), bad_loss

    with pytest.raises(NonFiniteLoss, match="outputs are finite: the loss function itself made it"):
        run(Model(), [torch.ones(2, 3)], forward)


def test_the_last_batch_can_be_had_again() -> None:
    batches = RememberingIterator(iter("abc"))
    assert iter(batches) is batches
    assert [next(batches), next(batches)] == ["a", "b"]
    assert list(batches.replay()) == ["b"]
    assert list(batches) == ["c"]
    assert list(batches.replay()) == ["c"]
