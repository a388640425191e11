"""A small model cut into several chunks on each rank, under every schedule, against the same model in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.activity import activity, listening
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
)
from megatron.core.stage_placement import placement_of
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.layer_placement import layers_of_chunk
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

LAYERS, S, B, H = 8, 5, 2, 6
Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A pipeline and what runs through it."""

    ranks: int
    schedule: str = "auto"
    chunks: int | None = None
    microbatches: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    forward_only: bool = False
    lengths: tuple[int, ...] | None = None

    def config(self) -> TransformerConfig:
        overlap = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        return TransformerConfig(
            num_layers=LAYERS,
            hidden_size=H,
            num_attention_heads=2,
            pipeline_model_parallel_size=self.ranks,
            virtual_pipeline_model_parallel_size=self.chunks,
            pipeline_schedule=self.schedule,  # type: ignore[arg-type]
            pipeline_dtype=torch.float32,
            deallocate_pipeline_outputs=True,
            variable_seq_lengths=self.lengths is not None,
            perform_initialization=False,
            **{**overlap, **self.settings},
        )


class Chunk(nn.Module):
    """Some layers: a linear layer, whose weight gradient may be postponed, and a norm, whose may not."""

    def __init__(self, config: TransformerConfig, first: int, count: int) -> None:
        super().__init__()
        self.config = config
        self.input_tensor: Tensor | None = None
        self.layers = nn.ModuleDict()
        for number in range(first, first + count):
            torch.manual_seed(number)
            linear = ColumnParallelLinear(H, H, config=config, init_method=nn.init.zeros_, skip_bias_add=False)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(H, H) / H**0.5)
                linear.bias.copy_(torch.randn(H))
            self.layers[str(number)] = nn.ModuleDict({"linear": linear, "norm": nn.LayerNorm(H)})

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        self.input_tensor = input_tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.input_tensor is None else self.input_tensor
        for layer in self.layers.values():
            hidden = hidden + layer["linear"](layer["norm"](hidden))[0]
        return hidden


def batches(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    lengths = case.lengths or (S,) * case.microbatches
    return [torch.randn(length, B, H, generator=generator) for length in lengths]


def report(output: Tensor, non_loss_data: bool = False) -> Any:
    if non_loss_data:
        return output.max()
    loss = output.square().sum()
    return loss, torch.tensor(output.numel()), {"loss": loss.detach()}


def forward_step(data: Iterator[Tensor], chunk: nn.Module) -> Any:
    return chunk(next(data)), report


def gradients(chunks: list[nn.Module]) -> Grads:
    return {name: param.grad for chunk in chunks for name, param in chunk.named_parameters() if param.grad is not None}


def run_step(case: Case) -> tuple[list[Any], Grads]:
    """One step on this rank of a pipeline."""
    config = case.config()
    placement = placement_of(config)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=case.ranks,
        virtual_pipeline_model_parallel_size=case.chunks,
        virtual_pipeline_shape=placement.shape,
    )
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks: list[nn.Module] = [
        Chunk(config, *layers_of_chunk(config, rank, chunk)) for chunk in range(placement.num_chunks)
    ]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches(case)) for _ in chunks],
        model=chunks,
        num_microbatches=case.microbatches,
        seq_length=S,
        micro_batch_size=B,
        forward_only=case.forward_only,
    )
    parallel_state.destroy_model_parallel()
    return reports, gradients(chunks)


def run_cases(cases: list[Case]) -> list[tuple[list[Any], Grads]]:
    return [run_step(case) for case in cases]


def expected(case: Case) -> tuple[list[Any], Grads]:
    """By plain autograd on the whole model."""
    model = Chunk(Case(1, settings={"overlap_p2p_comm": False}).config(), 0, LAYERS)
    reports = []
    for x in batches(case):
        loss, count, entry = report(model(x))
        reports.append(entry)
        if not case.forward_only:
            (loss / count / case.microbatches).backward()
    return reports, gradients([model])


INTERLEAVED = [
    {"chunks": 2},
    {"chunks": 2, "microbatches": 9, "settings": {"microbatch_group_size_per_vp_stage": 5}},
    {"chunks": 2, "settings": {"overlap_p2p_comm": False, "batch_p2p_comm": True}},
    {"chunks": 2, "settings": {"overlap_p2p_comm_warmup_flush": True}, "microbatches": 8},
    {"chunks": 2, "settings": {"delay_wgrad_compute": True}},
    {"chunks": 2, "lengths": (5, 2, 7, 1)},
]
OTHERS = [
    {"schedule": "gpipe"},
    {"schedule": "zb-h1", "microbatches": 7},
    {"schedule": "zb-h1", "microbatches": 2},
    {"schedule": "zb-h1", "settings": {"overlap_p2p_comm": False, "batch_p2p_comm": True}},
    {"schedule": "zb-v", "chunks": 2, "microbatches": 1},
    {"schedule": "zb-v", "chunks": 2, "microbatches": 5},
    {"schedule": "zb-v", "chunks": 2, "microbatches": 9},
    {"schedule": "zb-v", "chunks": 2, "lengths": (5, 2, 7, 1)},
    {"settings": {"delay_wgrad_compute": True}},
    {"settings": {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": None}, "ranks": 2},
    {"settings": {"pipeline_model_parallel_layout": "Ettttt||ttt|L"}, "chunks": 2, "ranks": 2},
    {"settings": {"pipeline_model_parallel_layout": "Et|tttttt||tL"}, "chunks": 2, "ranks": 2, "schedule": "zb-v"},
]
EVALUATIONS = [
    {"chunks": 2, "microbatches": 1},
    {"chunks": 2, "microbatches": 3, "settings": {"overlap_p2p_comm_warmup_flush": True}},
    {"schedule": "zb-v", "chunks": 2, "microbatches": 3},
    {"chunks": 2, "lengths": (4, 1, 6, 3)},
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_compute_what_one_process_computes(ranks: int) -> None:
    """Bitwise: neither cutting the model nor splitting its backward reorders any sum."""
    settings = [*INTERLEAVED, *OTHERS, *({**e, "forward_only": True} for e in EVALUATIONS)]
    if ranks == 2:
        settings.append({"chunks": 4})
    cases = [Case(**{"ranks": ranks, **values}) for values in settings if values.get("ranks", ranks) == ranks]
    by_rank = run_ranks(ranks, run_cases, cases)
    for case, *results in zip(cases, *by_rank):
        reports, grads = expected(case)
        last = placement_of(case.config()).last_rank
        assert [bool(found) for found, _ in results] == [rank == last for rank in range(ranks)], case
        torch.testing.assert_close(results[last][0], reports, rtol=0, atol=0, msg=str(case))
        found = {name: grad for _, mine in results for name, grad in mine.items()}
        assert sorted(found) == sorted(grads), case
        torch.testing.assert_close(found, grads, rtol=0, atol=0, msg=str(case))


def run_on_one_rank(splits: bool) -> tuple[list[Any], Grads]:
    config = Case(1, settings={"overlap_p2p_comm": False, "delay_wgrad_compute": splits}).config()
    chunks = [Chunk(config, 0, 3), Chunk(config, 3, 5)]
    reports = forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=[iter(batches(Case(1))) for _ in chunks],
        model=chunks,
        num_microbatches=4,
    )
    return reports, gradients(chunks)


@pytest.mark.parametrize("splits", [False, True])
def test_one_process_hands_on_from_chunk_to_chunk(splits: bool) -> None:
    torch.testing.assert_close(run_on_one_rank(splits), expected(Case(1)), rtol=0, atol=0)


def collect_from_chunks() -> list[Any]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    config = Case(2, chunks=2).config()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    assert get_forward_backward_func() is forward_backward_pipelining_with_interleaving
    return get_forward_backward_func()(
        forward_step_func=lambda data, chunk: (chunk(torch.ones(S, B, H)), report),
        data_iterator=None,
        model=[Chunk(config, *layers_of_chunk(config, rank, chunk)) for chunk in range(2)],
        num_microbatches=1,
        seq_length=S,
        micro_batch_size=B,
        forward_only=True,
        collect_non_loss_data=True,
    )


def test_what_is_no_loss_comes_from_the_last_chunk() -> None:
    first, (found,) = run_ranks(2, collect_from_chunks)
    assert first == []
    model = Chunk(Case(1, settings={"overlap_p2p_comm": False}).config(), 0, LAYERS)
    assert torch.equal(found, model(torch.ones(S, B, H)).max().detach())


def note_activities() -> list[tuple[Any, ...]]:
    noted: list[tuple[Any, ...]] = []

    def note(one: activity, end: float) -> None:
        noted.append((one.name, one.details.get("microbatch"), one.details.get("chunk"), one.peer, end > one.started))

    with listening(note):
        run_step(Case(2, "zb-v", 2, microbatches=1))
    return noted


def test_every_step_names_itself() -> None:
    first, second = run_ranks(2, note_activities)
    work = [(name, chunk) for name, microbatch, chunk, peer, took in first if peer is None and microbatch == 0]
    assert work == [
        ("forward", 0),
        ("forward", 1),
        ("input gradient", 1),
        ("weight gradient", 1),
        ("input gradient", 0),
        ("weight gradient", 0),
    ]
    waits = {(name, peer) for name, _, _, peer, _ in second if peer is not None}
    assert waits == {("receive", 0), ("send", 0)}
    assert all(took for *_, took in first + second)


def adjust(received: list[Any], sent: list[Any], by: int) -> tuple[list[Any], list[Any]]:
    (shape,) = received
    return [(shape[0] + by, *shape[1:])], [(shape[0] + by, *shape[1:])]


def run_with_other_shapes() -> tuple[list[Any], Grads]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = Case(2, settings={"overlap_p2p_comm": False}).config()
    chunk = Chunk(config, *layers_of_chunk(config, parallel_state.get_pipeline_model_parallel_rank()))
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches(Case(2))),
        model=chunk,
        num_microbatches=4,
        seq_length=S - 2,
        micro_batch_size=B,
        adjust_tensor_shapes_fn=partial(adjust, by=2),
    )
    with pytest.raises(NotImplementedError, match="one tensor in each direction"):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([]),
            model=chunk,
            num_microbatches=4,
            seq_length=S,
            micro_batch_size=B,
            adjust_tensor_shapes_fn=lambda received, sent: (received * 2, sent),
        )
    return reports, gradients([chunk])


def test_shapes_may_be_adjusted() -> None:
    (_, first), (reports, last) = run_ranks(2, run_with_other_shapes)
    torch.testing.assert_close((reports, first | last), expected(Case(2)), rtol=0, atol=0)
