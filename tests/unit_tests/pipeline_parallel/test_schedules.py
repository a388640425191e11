"""A small model cut into stages against the same model in one piece: reports, gradients, communication."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.microbatch import custom_backward, deallocate_output_tensor
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    get_tensor_shapes,
)
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

LAYERS, S, B, H = 4, 5, 2, 6  # layers, sequence, microbatch, hidden
Batch = dict[str, Tensor]
Grads = dict[int, Tensor]
"""Gradient of each layer by its number in the whole model."""


def transformer_config(**changes: Any) -> TransformerConfig:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    options = {"pipeline_model_parallel_size": stages, "pipeline_dtype": torch.float32, **changes}
    return TransformerConfig(num_layers=LAYERS, hidden_size=H, num_attention_heads=2, **options)


class Stage(nn.Module):
    """Some layers of the model; the whole model if there is one stage."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.input_tensor: Tensor | None = None
        count = LAYERS // parallel_state.get_pipeline_model_parallel_world_size()
        first = parallel_state.get_pipeline_model_parallel_rank() * count
        self.layers = nn.ModuleDict()
        for number in range(first, first + count):
            torch.manual_seed(number)
            self.layers[str(number)] = nn.Linear(H, H, bias=False, dtype=dtype)

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        self.input_tensor = input_tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.input_tensor is None else self.input_tensor
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden)) + 0.5
        return hidden


def microbatches(count: int, dtype: torch.dtype = torch.float32, lengths: list[int] | None = None) -> list[Batch]:
    """Each with another number of tokens that count."""
    generator = torch.Generator().manual_seed(9)
    batches = []
    for i in range(count):
        length = lengths[i] if lengths else S
        mask = torch.zeros(length * B)
        mask[: 1 + 3 * i % (length * B)] = 1.0
        x = torch.randn(length, B, H, generator=generator).to(dtype)
        batches.append({"x": x, "mask": mask.view(length, B)})
    return batches


def sum_and_tokens(
    batch: Batch, output: Tensor, non_loss_data: bool = False, counts_in: torch.dtype = torch.int64
) -> Any:
    if non_loss_data:
        return {"largest": output.max()}
    loss = (output.float().square().sum(-1) * batch["mask"]).sum()
    tokens = batch["mask"].sum().to(counts_in)
    return loss, tokens, {"loss": torch.stack([loss.detach(), tokens.float()])}


def mean_only(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.float().square().mean()
    return loss, {"loss": loss.detach()}


LossFunction = Callable[..., Any]


def forward_step(loss_function: LossFunction, batches: Iterator[Batch], model: nn.Module) -> Any:
    batch = next(batches)
    return model(batch["x"]), partial(loss_function, batch)


def layer_grads(model: nn.Module) -> Grads:
    return {
        int(name.split(".")[-2]): param.main_grad.clone() if hasattr(param, "main_grad") else param.grad
        for name, param in model.named_parameters()
    }


def run_step(
    model: nn.Module, batches: list[Batch], loss_function: LossFunction = sum_and_tokens, **options: Any
) -> list[Any]:
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, loss_function),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=S,
        micro_batch_size=B,
        **options,
    )


def expected_step(
    batches: list[Batch], loss_function: LossFunction, per_token: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], Grads]:
    """By plain autograd on the whole model."""
    model = Stage(transformer_config(), dtype)
    reports, tokens = [], 0
    for batch in batches:
        outputs = loss_function(batch, model(batch["x"]))
        reports.append(outputs[-1])
        if loss_function is mean_only:
            (outputs[0] / len(batches)).backward()
        elif per_token:
            outputs[0].backward()
            tokens += int(outputs[1])
        else:
            (outputs[0] / outputs[1] / len(batches)).backward()
    return reports, {layer: grad / (tokens or 1) for layer, grad in layer_grads(model).items()}


def merged(results: list[tuple[list[Any], Grads]]) -> tuple[list[Any], Grads]:
    """Reports of the last stage, gradients of all; the other stages must not report."""
    assert all(reports == [] for reports, _ in results[:-1])
    return results[-1][0], {layer: grad for _, grads in results for layer, grad in grads.items()}


def assert_same_step(found: tuple[list[Any], Grads], expected: tuple[list[Any], Grads], **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert sorted(found[1]) == sorted(expected[1]) == list(range(LAYERS))
    torch.testing.assert_close(found[1], expected[1], **tolerance)


def train_steps(stages: int, counts: list[int], loss_function: LossFunction, dtype: torch.dtype) -> list[Any]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    results = []
    for count in counts:
        model = Stage(transformer_config(pipeline_dtype=dtype), dtype)
        reports = run_step(model, microbatches(count, dtype), loss_function)
        results.append((reports, layer_grads(model)))
    return results


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(
    ("loss_function", "dtype"),
    [(sum_and_tokens, torch.float32), (mean_only, torch.float32), (sum_and_tokens, torch.bfloat16)],
)
def test_stages_compute_what_one_process_computes(stages: int, loss_function: LossFunction, dtype: torch.dtype) -> None:
    """Bitwise: cutting the model does not reorder any sum. Fewer microbatches than stages, as many, more."""
    counts = [1, 3, 4, 7]
    by_rank = run_ranks(stages, train_steps, stages, counts, loss_function, dtype)
    for count, *results in zip(counts, *by_rank):
        expected = expected_step(microbatches(count, dtype), loss_function, dtype=dtype)
        assert_same_step(merged(results), expected, rtol=0, atol=0)


def train_per_token(stages: int, count: int, counts_in: torch.dtype) -> tuple[list[Any], Grads]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    config = transformer_config(calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Stage(config))
    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    batches = microbatches(count)[replica::replicas]
    reports = run_step(model, batches, partial(sum_and_tokens, counts_in=counts_in))
    return reports, layer_grads(model)


@pytest.mark.parametrize("counts_in", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_per_token_loss_divides_by_all_tokens(stages: int, replicas: int, counts_in: torch.dtype) -> None:
    """Microbatches and replicas differ in tokens; the gradient is that of the mean over all of them."""
    results = run_ranks(stages * replicas, train_per_token, stages, 6, counts_in)
    reports, grads = expected_step(microbatches(6), sum_and_tokens, per_token=True)
    for replica in range(replicas):
        expected = reports[replica::replicas], grads
        assert_same_step(merged(results[replica::replicas]), expected)


def evaluate(stages: int) -> tuple[list[Any], list[Any]]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    model = Stage(transformer_config(finalize_model_grads_func=pytest.fail))
    reports = run_step(model, microbatches(3), forward_only=True)
    other = run_step(model, microbatches(3), forward_only=True, collect_non_loss_data=True)
    assert all(param.grad is None for param in model.parameters())
    assert torch.is_grad_enabled()
    return reports, other


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_evaluation_reports_and_leaves_no_gradients(stages: int) -> None:
    *others, (reports, collected) = run_ranks(stages, evaluate, stages)
    assert others == [([], [])] * (stages - 1)
    torch.testing.assert_close(reports, expected_step(microbatches(3), sum_and_tokens)[0], rtol=0, atol=0)
    model = Stage(transformer_config())
    largest = [{"largest": model(batch["x"]).max().detach()} for batch in microbatches(3)]
    torch.testing.assert_close(collected, largest, rtol=0, atol=0)


class NotesOutputs(Stage):
    """Keeps what it returned, to look at it after the step."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.outputs = [*getattr(self, "outputs", []), output]
        return output


def train_with_deallocation(deallocate: bool) -> tuple[list[Any], Grads]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model = NotesOutputs(transformer_config(deallocate_pipeline_outputs=deallocate))
    reports = run_step(model, microbatches(4))
    frees = deallocate and parallel_state.is_pipeline_first_stage()
    assert all(output.numel() == (1 if frees else S * B * H) for output in model.outputs)
    return reports, layer_grads(model)


def test_freeing_outputs_changes_nothing() -> None:
    kept, freed = (merged(run_ranks(2, train_with_deallocation, deallocate)) for deallocate in (False, True))
    assert_same_step(freed, kept, rtol=0, atol=0)


def test_freeing_needs_an_output_of_its_own() -> None:
    view = torch.zeros(4, 2)[:2]
    with pytest.raises(RuntimeError, match="must not be a view"):
        deallocate_output_tensor(view, deallocate_pipeline_outputs=True)
    deallocate_output_tensor(view, deallocate_pipeline_outputs=False)
    deallocate_output_tensor(None, deallocate_pipeline_outputs=True)
    assert view.shape == (2, 2)


def test_backward_through_a_freed_output() -> None:
    x = torch.arange(3.0, requires_grad=True)
    output = x * torch.tensor([1.0, 2.0, 3.0])
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert output.numel() == 1
    custom_backward(output, torch.tensor([1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [1.0, 20.0, 300.0]
    custom_backward((x * 2).sum(), None)
    assert x.grad.tolist() == [3.0, 22.0, 302.0]
    with pytest.raises(RuntimeError, match="must be a scalar loss"):
        custom_backward(x * 2, None)


def train_with_lengths(lengths: list[int]) -> tuple[list[Any], Grads]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=dist.get_world_size())
    model = Stage(transformer_config(variable_seq_lengths=True))
    return run_step(model, microbatches(len(lengths), lengths=lengths)), layer_grads(model)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_microbatches_may_differ_in_length(stages: int) -> None:
    lengths = [5, 2, 7, 1, 3]
    batches = microbatches(5, lengths=lengths)
    found = merged(run_ranks(stages, train_with_lengths, lengths))
    assert_same_step(found, expected_step(batches, sum_and_tokens), rtol=0, atol=0)


# --- hooks of the config ---


def check_no_sync(stages: int) -> None:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    events: list[str] = []

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        events.append("no sync")
        yield
        events.append("sync")

    finalize = lambda chunks, tokens: events.append(f"finalize {len(chunks)} {tokens}")  # noqa: E731
    model = Stage(transformer_config(no_sync_func=no_sync, finalize_model_grads_func=finalize))
    next(model.parameters()).register_post_accumulate_grad_hook(lambda param: events.append("grad"))
    run_step(model, microbatches(3))
    assert events == ["no sync", "grad", "grad", "sync", "grad", "finalize 1 None"]


@pytest.mark.parametrize("stages", [1, 2])
def test_gradients_are_synchronised_with_the_last_microbatch_only(stages: int) -> None:
    run_ranks(stages, check_no_sync, stages)


def train_with_scale(stages: int) -> tuple[list[Any], Grads]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    model = Stage(transformer_config(grad_scale_func=lambda loss: loss * 1024))
    return run_step(model, microbatches(3)), {k: g / 1024 for k, g in layer_grads(model).items()}


@pytest.mark.parametrize("stages", [1, 2])
def test_the_loss_scale_reaches_all_gradients_and_no_report(stages: int) -> None:
    found = merged(run_ranks(stages, train_with_scale, stages))
    assert_same_step(found, expected_step(microbatches(3), sum_and_tokens), rtol=0, atol=0)


def measure() -> set[str]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    timers = Timers(log_level=2, log_option="max")
    run_step(Stage(transformer_config(timers=timers)), microbatches(3))
    return set(timers._timers)


def test_timers_tell_computation_and_each_kind_of_transfer_apart() -> None:
    first, last = run_ranks(2, measure)
    compute = {"forward-backward", "forward-compute", "backward-compute"}
    assert first == compute | {"forward-send", "forward-send-backward-recv", "backward-recv"}
    assert last == compute | {"forward-recv", "backward-send-forward-recv", "backward-send"}


def output_dtype(**changes: Any) -> torch.dtype:
    model = NotesOutputs(transformer_config(**changes))
    (report,) = run_step(model, microbatches(1), forward_only=True)
    assert report["loss"].dtype == torch.float32
    return model.outputs[0].dtype


def test_autocast() -> None:
    assert output_dtype() == torch.float32
    assert output_dtype(enable_autocast=True, autocast_dtype=torch.bfloat16) == torch.bfloat16


# --- choosing a schedule, refusals ---


def test_one_process_needs_no_groups() -> None:
    assert get_forward_backward_func() is forward_backward_no_pipelining


def chooses(stages: int, expected: str) -> bool:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    return get_forward_backward_func() is getattr(schedules, expected)


def test_the_number_of_stages_chooses_the_schedule() -> None:
    assert all(run_ranks(2, chooses, 1, "forward_backward_no_pipelining"))
    assert all(run_ranks(2, chooses, 2, "forward_backward_pipelining_without_interleaving"))


def test_each_chunk_needs_its_data() -> None:
    model = Stage(transformer_config())
    with pytest.raises(ValueError, match="1 data iterators for 2 model chunks"):
        forward_backward_no_pipelining(
            forward_step_func=forward_step, data_iterator=iter([]), model=[model, model], num_microbatches=1
        )


def test_a_loss_function_returns_two_or_three_values() -> None:
    with pytest.raises(ValueError, match="2 or 3 values, not 4"):
        run_step(Stage(transformer_config()), microbatches(1), lambda batch, output: (output, 1, 2, 3))


def test_shapes_that_cross_a_border() -> None:
    def shapes(seq_length: int = 16, **changes: Any) -> list[tuple[int, int, int]]:
        config = transformer_config(**changes)
        return get_tensor_shapes(seq_length=seq_length, micro_batch_size=3, decoder_seq_length=None, config=config)

    assert shapes() == [(16, 3, H)]
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert shapes(**parallel) == [(8, 3, H)]
