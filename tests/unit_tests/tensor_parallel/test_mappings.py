"""Each communication of activations against plain arithmetic on all ranks' tensors, forward and backward.

Values are small integers, which every dtype sums exactly: results are compared bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from tests.worker_pool import run_ranks

S, B, H = 8, 2, 8  # sequence, microbatch, hidden
Tensors = list[Tensor]
"""One tensor for each rank."""


def total(xs: Tensors) -> Tensor:
    return torch.stack(xs).sum(0)


def everywhere(xs: Tensors, value: Tensor) -> Tensors:
    return [value for _ in xs]


def identity(xs: Tensors) -> Tensors:
    return xs


def summed(xs: Tensors) -> Tensors:
    return everywhere(xs, total(xs))


def gathered(dim: int) -> Callable[[Tensors], Tensors]:
    return lambda xs: everywhere(xs, torch.cat(xs, dim))


def own_part(dim: int) -> Callable[[Tensors], Tensors]:
    return lambda xs: [x.chunk(len(xs), dim)[rank] for rank, x in enumerate(xs)]


def own_part_of_sum(dim: int) -> Callable[[Tensors], Tensors]:
    return lambda xs: list(total(xs).chunk(len(xs), dim))


def exchanged(xs: Tensors) -> Tensors:
    return [torch.cat([x.chunk(len(xs))[rank] for x in xs]) for rank in range(len(xs))]


def tokens_to_hidden(xs: Tensors) -> Tensors:
    """[n/tp, h] on each rank -> [n, h/tp]."""
    return list(torch.cat(xs).chunk(len(xs), -1))


def hidden_to_tokens(xs: Tensors) -> Tensors:
    """[n, h/tp] on each rank -> [n/tp, h]."""
    return list(torch.cat(xs, -1).chunk(len(xs)))


@dataclass(frozen=True)
class Case:
    run: Callable[[Tensor], Tensor]
    forward: Callable[[Tensors], Tensors]
    backward: Callable[[Tensors], Tensors]
    shape: tuple[int, ...] = (S, B, H)


CASES = {
    "copy": Case(mappings.copy_to_tensor_model_parallel_region, identity, summed),
    "reduce": Case(mappings.reduce_from_tensor_model_parallel_region, summed, identity),
    "scatter hidden": Case(mappings.scatter_to_tensor_model_parallel_region, own_part(-1), gathered(-1)),
    "gather hidden": Case(mappings.gather_from_tensor_model_parallel_region, gathered(-1), own_part(-1)),
    "scatter sequence": Case(mappings.scatter_to_sequence_parallel_region, own_part(0), gathered(0)),
    "gather sequence": Case(mappings.gather_from_sequence_parallel_region, gathered(0), own_part_of_sum(0)),
    "gather sequence, whole gradients": Case(
        lambda x: mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False),
        gathered(0),
        own_part(0),
    ),
    "reduce-scatter sequence": Case(
        mappings.reduce_scatter_to_sequence_parallel_region, own_part_of_sum(0), gathered(0)
    ),
    "all-gather hidden": Case(
        mappings.all_gather_last_dim_from_tensor_parallel_region, gathered(-1), own_part_of_sum(-1)
    ),
    "reduce-scatter hidden": Case(
        mappings.reduce_scatter_last_dim_to_tensor_parallel_region, own_part_of_sum(-1), gathered(-1)
    ),
    "all-to-all": Case(
        lambda x: mappings.all_to_all(parallel_state.get_tensor_model_parallel_group(), x),
        exchanged,
        exchanged,
    ),
    "tokens to hidden": Case(mappings.all_to_all_sp2hp, tokens_to_hidden, hidden_to_tokens, (S, H)),
    "hidden to tokens": Case(mappings.all_to_all_hp2sp, hidden_to_tokens, tokens_to_hidden, (S, H)),
}


def small_integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 8, shape).to(dtype)


def compare(case: Case, xs: Tensors) -> None:
    """One collective call on this rank's element of `xs`, against the reference on all of them."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    x = xs[rank].clone().requires_grad_()
    expected = case.forward(xs)
    gradients = [small_integers(tuple(y.shape), y.dtype) for y in expected]
    expected_grad = case.backward(gradients)[rank]
    given = x * 1
    y = case.run(given)
    assert y.dtype == xs[rank].dtype
    torch.testing.assert_close(y, expected[rank], rtol=0, atol=0)
    gradient = gradients[rank].clone()
    y.backward(gradient)
    torch.testing.assert_close(x.grad, expected_grad, rtol=0, atol=0)
    assert torch.equal(given, xs[rank])  # neither the input
    assert torch.equal(gradient, gradients[rank])  # nor the gradient is changed in place


def check_cases(tp: int, dtype: torch.dtype) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    for name, case in CASES.items():
        torch.manual_seed(0)  # every rank draws the tensors of all ranks
        try:
            compare(case, [small_integers(case.shape, dtype) for _ in range(tp)])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_mappings_match_plain_arithmetic(tp: int, dtype: torch.dtype) -> None:
    run_ranks(tp, check_cases, tp, dtype)


def pieces_of(xs: Tensors, table: list[list[int]]) -> Tensors:
    """What each rank has after rank r has sent `table[r][q]` rows to every rank q."""
    parts = [x.split(rows) for x, rows in zip(xs, table)]
    return [torch.cat([sent[rank] for sent in parts]) for rank in range(len(xs))]


def check_uneven(rows: list[int], table: list[list[int]]) -> None:
    """`rows` of each rank for gathering; `table[r][q]` rows from rank r to rank q for all-to-all."""
    size = len(rows)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    gather, scatter = gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region

    def parts_of_sum(xs: Tensors) -> Tensors:
        return list(total(xs).split(rows))

    def own_parts(xs: Tensors) -> Tensors:
        return [x.split(rows)[rank] for rank, x in enumerate(xs)]

    torch.manual_seed(0)
    short = [small_integers((n, H), torch.float32) for n in rows]
    compare(Case(lambda x: gather(x, output_split_sizes=rows), gathered(0), parts_of_sum), short)
    compare(Case(lambda x: gather(x, False, output_split_sizes=rows), gathered(0), own_parts), short)
    long = [small_integers((sum(rows), H), torch.float32) for _ in rows]
    compare(Case(lambda x: scatter(x, input_split_sizes=rows), parts_of_sum, gathered(0)), long)

    back = [[table[r][q] for r in range(size)] for q in range(size)]

    def exchange(x: Tensor) -> Tensor:
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return mappings.all_to_all(group, x, back[rank], table[rank])

    sent = [small_integers((sum(n), H), torch.float32) for n in table]
    compare(Case(exchange, lambda xs: pieces_of(xs, table), lambda gs: pieces_of(gs, back)), sent)


@pytest.mark.parametrize(
    ("rows", "table"),
    [
        ([5], [[4]]),
        ([1, 4], [[2, 1], [0, 5]]),
        ([3, 1, 2, 5], [[1, 2, 0, 1], [0, 0, 3, 1], [2, 2, 2, 2], [4, 0, 0, 0]]),
    ],
)
def test_uneven_splits(rows: list[int], table: list[list[int]]) -> None:
    run_ranks(len(rows), check_uneven, rows, table)


def check_layouts_and_groups() -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    rank, data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_group()
    torch.manual_seed(0)
    xs = [small_integers((B, S, H), torch.float32) for _ in range(2)]
    x = xs[rank].clone().requires_grad_()
    strided = x.transpose(0, 1)  # [s, b, h]
    for name, run in (
        ("gather hidden", mappings.gather_from_tensor_model_parallel_region),
        ("reduce", mappings.reduce_from_tensor_model_parallel_region),
        ("reduce-scatter sequence", mappings.reduce_scatter_to_sequence_parallel_region),
        ("copy", mappings.copy_to_tensor_model_parallel_region),
    ):
        expected = CASES[name].forward([x.transpose(0, 1) for x in xs])[rank]
        y = run(strided, group=data)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        gradients = [small_integers((y.size(1), y.size(0), y.size(2)), torch.float32) for _ in xs]
        x.grad = None
        y.backward(gradients[rank].transpose(0, 1))
        expected = CASES[name].backward([g.transpose(0, 1) for g in gradients])[rank]
        torch.testing.assert_close(x.grad.transpose(0, 1), expected, rtol=0, atol=0)


def test_strided_tensors_and_other_groups() -> None:
    run_ranks(4, check_layouts_and_groups)


def check_shared_gradient() -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    # Addition hands the same gradient tensor to both of its inputs.
    (mappings.copy_to_tensor_model_parallel_region(x) + other).backward(torch.ones(3))
    assert x.grad.tolist() == [2, 2, 2]
    assert other.grad.tolist() == [1, 1, 1]


def test_reduced_gradients_leave_those_of_other_branches_alone() -> None:
    run_ranks(2, check_shared_gradient)


def check_refusals() -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        mappings.scatter_to_sequence_parallel_region(torch.zeros(7, B, H))
    with pytest.raises(ValueError, match="9 is not divisible by 2"):
        mappings.scatter_to_tensor_model_parallel_region(torch.zeros(S, B, 9))
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        mappings.reduce_scatter_to_sequence_parallel_region(torch.zeros(7, B, H))


def test_lengths_that_do_not_divide_are_refused() -> None:
    run_ranks(2, check_refusals)


def test_without_groups_all_mappings_are_the_identity() -> None:
    x = torch.arange(12.0).view(3, 4)
    for run in (
        mappings.copy_to_tensor_model_parallel_region,
        mappings.reduce_from_tensor_model_parallel_region,
        mappings.gather_from_sequence_parallel_region,
        mappings.reduce_scatter_last_dim_to_tensor_parallel_region,
        mappings.all_to_all_sp2hp,
    ):
        assert torch.equal(run(x), x)
