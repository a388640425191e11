"""A loss that is not finite: the message names where that began."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.training import nan_check
from megatron.training.nan_check import (
    FiniteCheck,
    NonFiniteLoss,
    Origin,
    RememberingIterator,
    begin_step,
    can_replay,
    explain,
    first_nonfinite_module,
    first_nonfinite_parameter,
    replay,
)
from tests.functional_tests.program import TINY, run_program
from tests.worker_pool import run_ranks


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


def losses_of(
    check: FiniteCheck, model: nn.Module, batches: Iterator[Tensor], forward: Any = forward_step
) -> list[Any]:
    """What the loss function gives for each batch, as a schedule computes it."""
    step, results = check.watching(forward), []
    with contextlib.suppress(StopIteration):
        while True:
            output, loss_function = step(batches, model)
            results.append(loss_function(output))
    return results


def stop_message(model: nn.Module, batches: list[Tensor], forward: Any = forward_step) -> str:
    """What a run on one rank that has to stop says."""
    check = FiniteCheck(rank=0, iteration=17)
    data = RememberingIterator(iter(batches))
    begin_step(data)
    losses_of(check, model, data, forward)

    def run_again() -> bool:
        can_run = can_replay(data)
        if can_run:
            losses_of(check, model, replay(data), forward)
        return can_run

    with pytest.raises(NonFiniteLoss) as stop:
        check.agree([model], [0], run_again)
    return str(stop.value)


def on_one_rank(function: Any, *args: Any) -> Any:
    return run_ranks(1, function, *args)[0]


def test_finite_losses_pass_unchanged() -> None:
    model, x = Model(), torch.ones(2, 3)
    ((loss, tokens, report),) = losses_of(FiniteCheck(rank=0), model, iter([x]))
    assert torch.equal(loss, model(x).sum())
    assert int(tokens) == 6
    assert torch.equal(report["lm loss"], model(x).mean())


def test_where_it_began() -> None:
    bad_weight, bad_module, bad_loss, too_large = on_one_rank(several_stops)
    assert bad_weight == (
        "rank 0: the loss of iteration 17 is nan; the first parameter that is not finite is layers.1.linear.weight, on "
        "rank 0. (--no-check-for-nan-in-loss-and-grad continues regardless.)"
    )
    # only the second batch overflows: the whole step is run again
    assert "all parameters are finite; the first output that is not comes from layers.1.divide, on rank 0" in bad_module
    assert "outputs are finite: the loss function or the backward pass made it" in bad_loss
    assert "all parameters are finite; the step was too large to be kept and run again" in too_large


def several_stops() -> list[str]:
    spoilt = Model()
    spoil(spoilt, "layers.1.linear.weight", "layers.2.linear.bias")
    overflows = Model()
    overflows.layers[1].divide.by = 1e-30
    with torch.no_grad():
        overflows.layers[0].linear.bias.fill_(0.0)
    overflowing = [torch.zeros(2, 3), torch.full((2, 3), 3e37)]

    def bad_loss(batches: Iterator[Tensor], model: nn.Module) -> Any:
        return model(next(batches)), lambda output: output.sum() / 0

    stops = [
        stop_message(spoilt, [torch.ones(2, 3)]),
        stop_message(overflows, overflowing),
        stop_message(Model(), [torch.ones(2, 3)], bad_loss),
    ]
    before, nan_check.MOST_BYTES_KEPT = nan_check.MOST_BYTES_KEPT, 40
    try:
        stops.append(stop_message(overflows, overflowing))
    finally:
        nan_check.MOST_BYTES_KEPT = before
    return stops


def test_earliest_stage_is_the_origin() -> None:
    """Rank 3, on the last stage, sees the loss; rank 0 and 1 hold the first stage."""
    complaint = ("rank 3: the loss of iteration 2 is nan",)
    origins = [
        Origin(3, 1, complaint, module="module.final_norm"),
        Origin(2, 1, (), module="module.decoder.layers.0"),
        Origin(1, 0, (), module="module.decoder.layers.1"),
        Origin(0, 0, ()),
    ]
    assert explain(origins) == (
        f"{complaint[0]}; all parameters are finite; the first output that is not comes from "
        "module.decoder.layers.1, on rank 1"
    )
    with_parameter = [*origins, Origin(4, 1, (), parameter="output_layer.weight")]
    assert "the first parameter that is not finite is output_layer.weight, on rank 4" in explain(with_parameter)


def test_a_step_is_kept_until_the_next_begins() -> None:
    batches = RememberingIterator(iter("abcde"))
    assert iter(batches) is batches
    assert next(batches) == "a" and batches.kept is None  # nobody asked for it
    batches.begin_step()
    assert [next(batches), next(batches)] == ["b", "c"]
    assert list(batches.replay()) == list(batches.replay()) == ["b", "c"]
    batches.begin_step()
    assert next(batches) == "d" and list(batches.replay()) == ["d"]


def test_steps_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nan_check, "MOST_BYTES_KEPT", 100)
    batches = RememberingIterator(iter([{"tokens": torch.zeros(10)}] * 5))
    batches.begin_step()
    next(batches), next(batches)
    assert batches.kept is not None and batches.bytes_kept == 80
    next(batches)
    assert batches.kept is None
    batches.begin_step()
    next(batches)
    assert batches.kept is not None


def test_spikes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check = FiniteCheck(rank=5, checks_finite=False, checks_spikes=True)

    def see(loss: float) -> None:
        def forward(batches: Iterator[Tensor], model: nn.Module) -> Any:
            return torch.full((4,), loss), mean_loss  # a mean of `loss` a token

        check.iteration += 1
        _, loss_function = check.watching(forward)(None, Model())
        loss_function(torch.full((4,), loss))

    for i in range(nan_check.LOSSES_REMEMBERED):
        see(1e6 if i == 0 else 1.0)  # no judgement before so many are known
    check.first_losses[0] = 2.0
    see(19.0)
    see(float("nan"))
    assert not caplog.records
    see(20.0)
    assert "spiky loss: 2.000000E+01 in iteration 103 on rank 5" in caplog.text


# --- on several ranks -----------------------------------------------------------------------------


def spoiled_run(flags: str, victim: int) -> str:
    """Train; a weight of one rank is spoilt before its third step."""
    from megatron.training import training

    original, calls = training.train_step, itertools.count()

    def train_step(forward: Any, data: Any, model: Any, *args: Any) -> Any:
        if next(calls) == 2 and torch.distributed.get_rank() == victim:
            with torch.no_grad():
                dict(model[0].named_parameters())["module.decoder.layers.0.mlp.linear_fc1.weight"][0] = float("nan")
        return original(forward, data, model, *args)

    training.train_step = train_step
    try:
        return run_program("pretrain_gpt.py", [*TINY, "--train-iters", "9", *flags.split()])
    except RuntimeError as error:
        return str(error.__cause__)
    finally:
        training.train_step = original


@pytest.mark.parametrize(
    "world_size, flags, victim",
    [
        (2, "", 1),  # data parallel: only one replica is bad
        (2, "--pipeline-model-parallel-size 2", 0),  # seen on the last stage, made on the first
        (2, "--context-parallel-size 2", 1),
        (4, "--tensor-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce", 2),
    ],
)
def test_all_ranks_stop_with_one_message(world_size: int, flags: str, victim: int) -> None:
    messages = run_ranks(world_size, spoiled_run, flags, victim)
    assert len(set(messages)) == 1
    assert "of iteration 3" in messages[0]
    name = r"module\.decoder\.layers\.0\.mlp\.linear_fc1\.weight"
    assert re.search(rf"first parameter that is not finite is {name}, on rank {victim}\b", messages[0])
