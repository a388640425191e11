"""Gradients of weights apart from gradients of inputs, which is what the stage before waits for (arXiv:2401.10241,
section 2).

A linear layer's backward has two products, dx = dy W and dW = dyᵀ x. Under `deferring_weight_grads(queue)` the layers
compute the first and leave the second, with dy and x, in the queue; `queue.run()` makes up for it. Parameters outside
of the linear layers (norms, biases, embeddings) get their gradient in backward as always.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import InFlight, start_all_gather
from megatron.core.tensor_parallel.gemm import PLAIN_PRODUCTS, LinearProducts


@dataclass(frozen=True)
class PostponedProduct:
    """dyᵀ x, still to be computed."""

    weight: Tensor
    grad_output: Tensor
    """dy [..., out]."""
    x: Tensor
    """[..., in], of which each rank of `group` has its part of the first dimension."""
    group: ProcessGroup | None
    """Ranks from which x is gathered (sequence parallelism); None where x is whole."""
    accumulate: bool
    """Add to `weight.main_grad`, where there is one."""
    products: LinearProducts = PLAIN_PRODUCTS
    """How to multiply."""


@dataclass
class WeightGradQueue:
    """Products that backward left for later, in the order in which it came to them."""

    limit: int = 0
    """Most products that it takes; 0 is any number."""
    _products: deque[PostponedProduct] = field(default_factory=deque)

    @property
    def has_room(self) -> bool:
        """Whether it takes another product."""
        return not self.limit or len(self._products) < self.limit

    def __len__(self) -> int:
        return len(self._products)

    def add(self, product: PostponedProduct) -> None:
        """Postpone a product; its weight's gradient is incomplete until `run`."""
        weight = product.weight
        weight._num_postponed_grads = num_postponed_grads(weight) + 1  # type: ignore[attr-defined]
        self._products.append(replace(product, grad_output=product.grad_output.detach(), x=product.x.detach()))

    def clear(self) -> None:
        """Forget all products, as after a step that failed."""
        for product in self._products:
            product.weight._num_postponed_grads = 0  # type: ignore[attr-defined]
        self._products.clear()

    def run(self) -> None:
        """Compute all products and add them to the gradients. What waits for a parameter's gradient learns of it as
        from any backward.

        Communicates: all-gathers of x where layers have cut it (sequence parallelism), each in flight while the product
        before it is computed.
        """
        gathering = self._start_gathering()
        while self._products:
            product, arriving = self._products.popleft(), gathering
            gathering = self._start_gathering()
            assert arriving is not None
            with torch.enable_grad():
                root = _Product.apply(product.weight, product, arriving.wait())
            root.backward()

    def _start_gathering(self) -> InFlight | None:
        if not self._products:
            return None
        return start_all_gather(self._products[0].x, self._products[0].group, what="input of a linear layer")


class _Product(torch.autograd.Function):
    """Nothing, whose backward gives the weight its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, product: PostponedProduct, x: Tensor) -> Tensor:
        ctx.product, ctx.x = product, x
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None, None]:
        weight, products = ctx.product.weight, ctx.product.products
        weight._num_postponed_grads = num_postponed_grads(weight) - 1
        dy = products.gradient(ctx.product.grad_output)
        return products.weight_gradient(weight, dy, ctx.x, ctx.product.accumulate), None, None


def num_postponed_grads(param: Tensor) -> int:
    """Products that a parameter's gradient still lacks: it is not ready to be reduced while there are any."""
    return getattr(param, "_num_postponed_grads", 0)


_active: WeightGradQueue | None = None
# Not thread local: on an accelerator autograd runs backward in threads of its own.


@contextmanager
def deferring_weight_grads(queue: WeightGradQueue) -> Iterator[WeightGradQueue]:
    """Backward inside leaves the linear layers' weight gradients in `queue`."""
    global _active
    before, _active = _active, queue
    try:
        yield queue
    finally:
        _active = before


def postpone(product: PostponedProduct, queue: WeightGradQueue | None = None) -> bool:
    """Leave a product in the layer's own `queue` if that has room, else in that of whoever splits this backward.

    False if there is neither, or the weight is itself computed from others: then the product has to be made now.
    """
    chosen = queue if queue is not None and queue.has_room else _active
    if chosen is None or not product.weight.is_leaf:
        return False
    chosen.add(product)
    return True
