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

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import start_all_gather
from megatron.core.tensor_parallel.gemm import weight_gradient


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


@dataclass
class WeightGradQueue:
    """Products that backward left for later, in the order in which it came to them."""

    _products: deque[PostponedProduct] = field(default_factory=deque)

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

    @torch.no_grad()
    def run(self) -> None:
        """Compute all products, add them to the gradients, and call the parameters' hooks as autograd would.

        Communicates: all-gathers of x where layers have cut it (sequence parallelism), each in flight while the product
        before it is computed.
        """
        gathering = None if not self._products else start_all_gather(self._products[0].x, self._products[0].group)
        while self._products:
            product, arriving = self._products.popleft(), gathering
            if self._products:
                gathering = start_all_gather(self._products[0].x, self._products[0].group)
            assert arriving is not None
            _deliver(product, arriving.wait())


def _deliver(product: PostponedProduct, x: Tensor) -> None:
    weight = product.weight
    grad = weight_gradient(weight, product.grad_output, x, product.accumulate)
    if grad is not None:
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
    weight._num_postponed_grads = num_postponed_grads(weight) - 1  # type: ignore[attr-defined]
    for hook in (weight._post_accumulate_grad_hooks or {}).values():
        hook(weight)


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


def active_queue() -> WeightGradQueue | None:
    """Where weight gradients are to be left now; None to compute them at once."""
    return _active
