"""Weight gradients that are computed later: the same numbers, in order, each once, and nobody is told too early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.tensor_parallel import gemm, weight_grad_queue
from megatron.core.tensor_parallel.weight_grad_queue import (
    PostponedProduct,
    WeightGradQueue,
    deferring_weight_grads,
    num_postponed_grads,
    postpone,
)
from tests.worker_pool import run_ranks

OUT, IN = 5, 3


def product(weight: Tensor, seed: int = 0, accumulate: bool = False) -> PostponedProduct:
    generator = torch.Generator().manual_seed(seed)
    dy, x = torch.randn(4, 2, OUT, generator=generator), torch.randn(4, 2, IN, generator=generator)
    return PostponedProduct(weight, dy, x, None, accumulate)


def expected(*products: PostponedProduct) -> Tensor:
    return sum(one.grad_output.flatten(0, 1).t() @ one.x.flatten(0, 1) for one in products)  # type: ignore[return-value]


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(OUT, IN))


@pytest.mark.parametrize("accumulate", [False, True])
def test_products_are_added_to_the_gradient_once(accumulate: bool) -> None:
    weight, queue = parameter(), WeightGradQueue()
    if accumulate:
        weight.main_grad = torch.ones(OUT, IN)
    products = [product(weight, seed, accumulate) for seed in range(3)]
    for one in products:
        queue.add(one)
    assert len(queue) == num_postponed_grads(weight) == 3 and weight.grad is None
    for _ in range(2):  # the second time there is nothing to do
        queue.run()
        found = weight.main_grad - 1 if accumulate else weight.grad
        torch.testing.assert_close(found, expected(*products))
        assert len(queue) == num_postponed_grads(weight) == 0
    assert (weight.grad is None) == accumulate


def test_products_run_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, queue, order = [parameter() for _ in range(3)], WeightGradQueue(), []
    original = gemm.weight_gradient
    monkeypatch.setattr(
        gemm, "weight_gradient", lambda weight, *rest: order.append(id(weight)) or original(weight, *rest)
    )
    for weight in (weights[1], weights[0], weights[2], weights[1]):
        queue.add(product(weight))
    queue.run()
    assert order == [id(weights[i]) for i in (1, 0, 2, 1)]


def test_who_waits_for_a_gradient_hears_when_its_last_part_has_come() -> None:
    weight, queue, missing = parameter(), WeightGradQueue(), []
    weight.register_post_accumulate_grad_hook(lambda param: missing.append(num_postponed_grads(param)))
    for seed in range(3):
        queue.add(product(weight, seed))
    queue.run()
    assert missing == [2, 1, 0]


def test_the_queue_keeps_no_graph_alive() -> None:
    weight, queue = parameter(), WeightGradQueue()
    x = torch.randn(4, 2, IN, requires_grad=True) * 2
    queue.add(PostponedProduct(weight, torch.ones(4, 2, OUT), x, None, False))
    with torch.no_grad():  # as a schedule may run it
        queue.run()
    torch.testing.assert_close(weight.grad, torch.ones(8, OUT).t() @ x.detach().flatten(0, 1))
    kept = WeightGradQueue()
    kept.add(PostponedProduct(weight, torch.ones(4, 2, OUT), x, None, False))
    assert not any(one.x.requires_grad or one.grad_output.requires_grad for one in kept._products)


def test_a_step_that_failed_is_forgotten() -> None:
    weight, queue = parameter(), WeightGradQueue()
    queue.add(product(weight))
    queue.clear()
    queue.run()
    assert weight.grad is None and num_postponed_grads(weight) == 0


def test_where_a_product_goes() -> None:
    """Into the layer's own queue while it has room, then to whoever splits this backward; else it is made now."""
    weight, own, split = parameter(), WeightGradQueue(limit=1), WeightGradQueue()
    assert not postpone(product(weight))
    assert postpone(product(weight), own) and not own.has_room
    assert not postpone(product(weight), own)
    with deferring_weight_grads(split):
        assert postpone(product(weight), own) and postpone(product(weight))
        assert not postpone(product(weight * 1.0))  # computed from others: autograd has to go on through it
    assert (len(own), len(split)) == (1, 2)
    own.run()
    assert own.has_room and num_postponed_grads(weight) == 2


def test_splits_nest_and_end_with_an_error() -> None:
    weight, outer, inner = parameter(), WeightGradQueue(), WeightGradQueue()
    with deferring_weight_grads(outer):
        with pytest.raises(KeyError), deferring_weight_grads(inner):
            postpone(product(weight))
            raise KeyError
        postpone(product(weight))
    assert (len(outer), len(inner)) == (1, 1) and not postpone(product(weight))


def gather_behind_products() -> list[str]:
    """Inputs that are cut over two ranks; what this rank did when."""
    weight, queue, log = parameter(), WeightGradQueue(), []
    wholes = [product(weight, seed) for seed in range(3)]
    rank = dist.get_rank()
    start, multiply = weight_grad_queue.start_all_gather, gemm.weight_gradient

    def start_noted(*args: Any, **kwargs: Any) -> Any:
        log.append("gather")
        return start(*args, **kwargs)

    def multiply_noted(*args: Any) -> Any:
        log.append("product")
        return multiply(*args)

    weight_grad_queue.start_all_gather, gemm.weight_gradient = start_noted, multiply_noted
    try:
        for whole in wholes:
            part = whole.x[2 * rank : 2 * rank + 2]
            queue.add(PostponedProduct(weight, whole.grad_output, part, dist.group.WORLD, False))
        queue.run()
    finally:
        weight_grad_queue.start_all_gather, gemm.weight_gradient = start, multiply
    torch.testing.assert_close(weight.grad, expected(*wholes))
    return log


def test_cut_inputs_are_gathered_behind_the_product_before() -> None:
    for log in run_ranks(2, gather_behind_products):
        assert log == ["gather", "gather", "product", "gather", "product", "product"]
