"""Initial values are a function of seed, global name and position: equal in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.ssm.mamba_mixer import _initial_dt, _initial_log, _initial_uniform
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    deferred_initialization,
    initialize_parameters,
    model_parallel_cuda_manual_seed,
    register_parameter_init,
    set_initialization_seed,
)
from megatron.core.tensor_parallel.initialization import BLOCK_ELEMENTS
from megatron.core.utils import init_method_normal
from tests.worker_pool import run_ranks

Init = Callable[[Tensor], object]
normal = init_method_normal(0.02)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    set_initialization_seed(11)
    yield
    set_initialization_seed(None)
    torch.set_rng_state(state)


def number_elements(tensor: Tensor) -> None:
    """An initialiser that looks at the whole tensor."""
    with torch.no_grad():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + torch.rand(()))


class Parameters(nn.Module):
    """Shards of full tensors on one rank, filled when the module is complete."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        *,
        dim: int = -1,
        stride: int = 1,
        init: Init = normal,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        size = 1 if group is None else group.size()
        with deferred_initialization():
            for name, shape in shapes.items():
                local = [n // size if i == dim else n for i, n in enumerate(shape)]
                param = nn.Parameter(torch.full(local, math.nan, dtype=dtype))
                register_parameter_init(param, init, partition_dim=dim, tp_group=group, stride=stride)
                self.register_parameter(name, param)
            initialize_parameters(self)  # waits: the outer context is still open
            assert all(bool(param.isnan().all()) for param in self.parameters())
        initialize_parameters(self)


def values(shape: tuple[int, ...], **options: object) -> Tensor:
    return Parameters({"weight": shape}, **options).weight.detach()


def shards(tp: int, *, shape: tuple[int, ...], **options: object) -> list[Tensor]:
    return run_ranks(tp, shard_of_this_rank, tp, shape, options)


def shard_of_this_rank(tp: int, shape: tuple[int, ...], options: dict[str, object]) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    set_initialization_seed(11)
    torch.manual_seed(dist.get_rank())  # whatever a rank has drawn so far must not matter
    return values(shape, **options)


@pytest.mark.parametrize("init", [normal, number_elements])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_parts_of_the_full_tensor(tp: int, dim: int, init: Init) -> None:
    full = values((16, 24), init=init)
    assert torch.equal(torch.cat(shards(tp, shape=(16, 24), dim=dim, init=init), dim), full)


@pytest.mark.parametrize("dim", [0, 1])
def test_stacked_tensors_are_cut_one_by_one(dim: int) -> None:
    """Gate and up projection in one weight: each rank holds its part of both."""
    full = values((16, 24), dim=dim, stride=2)
    gate, up = full.chunk(2, dim)
    parts = shards(4, shape=(16, 24), dim=dim, stride=2)
    assert torch.equal(torch.cat([part.chunk(2, dim)[0] for part in parts], dim), gate)
    assert torch.equal(torch.cat([part.chunk(2, dim)[1] for part in parts], dim), up)


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_tensors_of_several_blocks(dim: int) -> None:
    columns = BLOCK_ELEMENTS // 400 * 4  # blocks of 100 rows
    shape = (250, columns)
    full = values(shape)
    assert not torch.equal(full[:50], full[100:150])
    parts = shards(2, shape=shape, dim=dim)
    if dim < 0:
        assert all(torch.equal(part, full) for part in parts)
    else:
        assert torch.equal(torch.cat(parts, dim), full)


def test_rows_longer_than_a_block() -> None:
    full = values((3, BLOCK_ELEMENTS + 1))
    assert bool(full.isfinite().all())
    assert len({float(row[0]) for row in full}) == 3


@pytest.mark.parametrize("rows", [100, 250])
def test_a_vocabulary_padded_to_another_size_has_the_same_first_rows(rows: int) -> None:
    columns = BLOCK_ELEMENTS // 400 * 4  # blocks of 100 rows
    assert torch.equal(values((rows, columns)), values((260, columns))[:rows])


class Whole:
    """An initialiser that does not say that its values are drawn one after the other: blocks are drawn whole."""

    blockwise = True

    def __init__(self, init: Init) -> None:
        self.init = init

    def __call__(self, tensor: Tensor) -> object:
        assert tensor.numel() >= BLOCK_ELEMENTS // 2
        return self.init(tensor)


SEQUENTIAL = {
    "normal": normal,
    "uniform": _initial_uniform(0.5),
    "time steps": _initial_dt(0.001, 0.1, 1e-4),
    "logarithms": _initial_log(1, 16),
}


@pytest.mark.parametrize("kind", SEQUENTIAL)
@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (33,), (5, 7), (64, 32), (3, 5, 11), (700, 999)])
def test_the_beginning_of_a_block_is_that_of_the_whole_block(kind: str, shape: tuple[int, ...]) -> None:
    assert torch.equal(values(shape, init=SEQUENTIAL[kind]), values(shape, init=Whole(SEQUENTIAL[kind])))


@pytest.mark.parametrize("rows", [349_519, 349_520, 349_525, 349_526])
def test_the_end_of_a_block_is_that_of_the_whole_block(rows: int) -> None:
    """A block of 349 525 rows of 3: no multiple of 16 numbers, so that torch draws the last 16 anew."""
    assert torch.equal(values((rows, 3)), values((rows, 3), init=Whole(normal)))


def check_layers() -> list[Tensor]:
    """The embedding and both kinds of linear layer, whole."""
    tp = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(5)
    config = ModelParallelConfig(tensor_model_parallel_size=tp)
    model = nn.Module()
    with deferred_initialization():
        options = {"config": config, "init_method": normal}
        model.embedding = VocabParallelEmbedding(16, 8, **options)
        model.column = ColumnParallelLinear(8, 12, **options)
        model.fc1 = ColumnParallelLinear(8, 16, stride=2, bias=False, **options)
        model.row = RowParallelLinear(12, 8, bias=True, input_is_parallel=True, skip_bias_add=True, **options)
    initialize_parameters(model)
    group = parallel_state.get_tensor_model_parallel_group()

    def whole(param: nn.Parameter) -> Tensor:
        if not param.tensor_model_parallel:
            return param.detach()
        parts = [torch.empty_like(param) for _ in range(tp)]
        dist.all_gather(parts, param.detach(), group=group)
        stacked = [torch.stack(part.chunk(param.partition_stride, param.partition_dim)) for part in parts]
        return torch.cat(stacked, param.partition_dim + 1)

    return [whole(param) for param in model.parameters()]


def test_layers_start_equal_for_any_number_of_ranks() -> None:
    serial = run_ranks(1, check_layers)[0]
    assert all(bool(param.isfinite().all()) for param in serial)
    for tp in (2, 4):
        for found in run_ranks(tp, check_layers):
            torch.testing.assert_close(found, serial, rtol=0, atol=0)


def test_values_depend_on_name_and_seed_only() -> None:
    model = Parameters({"a": (4, 4), "b": (4, 4)})
    alone = Parameters({"b": (4, 4)})
    assert not torch.equal(model.a, model.b)
    assert torch.equal(model.b, alone.b)
    set_initialization_seed(12)
    assert not torch.equal(Parameters({"b": (4, 4)}).b, alone.b)


def test_an_explicit_seed_wins_and_the_default_generator_is_the_last_resort() -> None:
    model = Parameters({"a": (4, 4)})
    first = model.a.detach().clone()
    initialize_parameters(model, seed=12)
    assert not torch.equal(model.a, first)
    initialize_parameters(model, seed=11)
    assert torch.equal(model.a, first)
    set_initialization_seed(None)
    torch.manual_seed(11)
    torch.rand(5)  # the seed counts, not the generator's state
    initialize_parameters(model)
    assert torch.equal(model.a, first)


def test_global_names_make_the_values_of_a_pipeline_stage() -> None:
    whole = Parameters({"layer0": (4, 4), "layer1": (4, 4)})
    stage = Parameters({"layer0": (4, 4)})
    initialize_parameters(stage, global_name={"layer0": "layer1"}.__getitem__)
    assert torch.equal(stage.layer0, whole.layer1)


def test_the_default_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    values((4, 4))
    values((4, 4), init=number_elements)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)


def test_deferral_may_be_nested() -> None:
    model = nn.Module()
    with deferred_initialization():
        with deferred_initialization():
            model.weight = nn.Parameter(torch.zeros(4, 4))
            register_parameter_init(model.weight, normal)
        initialize_parameters(model)
        model.other = nn.Parameter(torch.zeros(4, 4))
        register_parameter_init(model.other, normal)
        assert not model.weight.any()
    assert not model.other.any()
    initialize_parameters(model)
    assert bool(model.weight.all())
    assert torch.equal(model.weight, Parameters({"weight": (4, 4)}).weight)


def fill_at_once() -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(3)
    param = nn.Parameter(torch.empty(2, 6))
    group = parallel_state.get_tensor_model_parallel_group()
    register_parameter_init(param, normal, partition_dim=0, tp_group=group)
    return param.detach()


def test_outside_deferral_parameters_are_filled_at_once() -> None:
    torch.manual_seed(3)
    assert torch.equal(torch.cat(run_ranks(2, fill_at_once)), normal(torch.empty(4, 6)))


def test_parameters_of_a_checkpoint_need_no_values() -> None:
    config = ModelParallelConfig(perform_initialization=False)
    layer = ColumnParallelLinear(4, 4, config=config, init_method=pytest.fail)
    with deferred_initialization():
        model = nn.Sequential(ColumnParallelLinear(4, 4, config=config, init_method=pytest.fail))
    initialize_parameters(model)
    assert layer.weight.shape == (4, 4)


def test_a_tied_parameter_is_filled_once() -> None:
    calls: list[str] = []
    model = nn.Module()
    with deferred_initialization():
        model.weight = nn.Parameter(torch.zeros(2))
        register_parameter_init(model.weight, lambda tensor: calls.append("filled"))
        model.again = model.weight
    initialize_parameters(model)
    assert calls == ["filled"]


def test_meta_parameters_and_unregistered_ones_stay() -> None:
    model = nn.Module()
    with deferred_initialization():
        model.meta = nn.Parameter(torch.empty(2, device="meta"))
        register_parameter_init(model.meta, pytest.fail)
        model.mine = nn.Parameter(torch.full((2,), 7.0))
    initialize_parameters(model)
    assert model.mine.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("shape", [(), (5,), (3, 2, 2)])
def test_other_numbers_of_dimensions(shape: tuple[int, ...]) -> None:
    found = values(shape, init=init_method_normal(1.0))
    assert found.shape == shape
    assert bool(found.isfinite().all())
    assert len(set(found.flatten().tolist())) == found.numel()


def test_half_precision_rounds_the_same_draw() -> None:
    assert torch.equal(values((8, 8), dtype=torch.bfloat16), values((8, 8)).bfloat16())


def test_the_normal_has_the_mean_and_deviation_asked_for() -> None:
    """One million draws: the mean lies within 5 standard errors, the deviation within 1 %."""
    drawn = values((1000, 1000), init=init_method_normal(0.02))
    assert abs(float(drawn.mean())) < 5 * 0.02 / 1000
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.01)
    assert 4 * 0.02 < float(drawn.abs().max()) < 7 * 0.02
