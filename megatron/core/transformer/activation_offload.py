"""Activations, and weights, that wait in host memory between a layer's forward and its backward.

The first layers of a model are the last ones to go backward: what they keep waits longest. While layer i goes
backward, what layer i - 1 has put away is on its way back. Backward gets the same values: numbers do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.host_store import HostStore, host_store
from megatron.core.transformer.transformer_config import TransformerConfig

SMALLEST = 1024
"""Elements below which a tensor stays: what a copy costs at least does not pay."""


class _PutAway:
    """One tensor that a layer keeps for backward."""

    def __init__(self, store: HostStore, tensor: Tensor) -> None:
        self.store, self.ticket = store, store.put(tensor)
        self.fetched: Any = None

    def fetch(self) -> None:
        if self.fetched is None:
            self.fetched = self.store.fetch(self.ticket)

    def take(self) -> Tensor:
        self.fetch()
        return self.store.arrive(self.fetched)


class _Weights:
    """The weights of a layer, whose memory is free while they are put away."""

    def __init__(self, store: HostStore, module: nn.Module) -> None:
        self.store = store
        # Views, as of the distributed optimizer's flat buffers, share memory that others need.
        self.params = [p for p in module.parameters() if p.untyped_storage().nbytes() == p.numel() * p.element_size()]
        self.tickets: list[Any] = []
        self.fetched: list[Any] = []

    def put_away(self) -> None:
        self.tickets = [self.store.put(param.detach()) for param in self.params]
        for param in self.params:
            param.untyped_storage().resize_(0)

    def fetch(self) -> None:
        tickets, self.tickets = self.tickets, []
        for param, ticket in zip(self.params, tickets):
            param.untyped_storage().resize_(param.numel() * param.element_size())
            self.fetched.append(self.store.fetch(ticket, into=param.data))  # .data: autograd sees no change

    def take(self) -> None:
        self.fetch()
        fetched, self.fetched = self.fetched, []
        for each in fetched:
            self.store.arrive(each)


class _Luggage:
    """What one layer has put away in one forward pass; the layer before it is fetched when this one is opened."""

    def __init__(self, weights: _Weights | None, before: _Luggage | None) -> None:
        self.weights, self.before = weights, before
        self.activations: list[_PutAway] = []
        self.opened = False

    def fetch(self) -> None:
        if self.weights is not None:
            self.weights.fetch()
        for activation in self.activations:
            activation.fetch()

    def open(self) -> None:
        if self.opened:
            return
        self.opened = True
        if self.weights is not None:
            self.weights.take()
        before, self.before, self.activations = self.before, None, []
        if before is not None:
            before.fetch()


class ActivationOffload:
    """Puts away what the first `cpu_offloading_num_layers` layers of a stack keep for backward.

        forward_pass = offload.forward_pass(tensors that all layers share)
        for i, layer in enumerate(layers):
            with forward_pass.layer(i, layer):
                x = layer(x)

    Args:
        store: where to; the device's own store if None.
    """

    def __init__(self, config: TransformerConfig, store: HostStore | None = None) -> None:
        self.num_layers = config.cpu_offloading_num_layers if config.cpu_offloading else 0
        self.activations, self.weights = config.cpu_offloading_activations, config.cpu_offloading_weights
        self.store = (store or host_store()) if config.cpu_offloading else None
        self.weights_of: dict[int, _Weights] = {}

    def forward_pass(self, shared: Iterable[Any]) -> _ForwardPass:
        """One pass through the stack.

        Args:
            shared: what is handed to all layers: tensors among it stay where they are.
        """
        return _ForwardPass(self, shared)


class _ForwardPass:
    def __init__(self, offload: ActivationOffload, shared: Iterable[Any]) -> None:
        self.offload = offload
        self.shared = {t.untyped_storage().data_ptr() for t in shared if isinstance(t, Tensor)}
        self.last: _Luggage | None = None

    def layer(self, index: int, layer: nn.Module) -> AbstractContextManager[Any]:
        """Where layer `index` is to go forward. The one after those that put things away only fetches theirs."""
        if index > self.offload.num_layers or self.offload.store is None or not torch.is_grad_enabled():
            return nullcontext()
        weights = None
        if index < self.offload.num_layers and self.offload.weights:
            weights = self.offload.weights_of.setdefault(index, _Weights(self.offload.store, layer))
        self.last = _Luggage(weights, self.last)
        return self._around(layer, self.last, self.offload.activations and index < self.offload.num_layers)

    @contextmanager
    def _around(self, layer: nn.Module, luggage: _Luggage, with_activations: bool) -> Iterator[None]:
        store, weights = self.offload.store, luggage.weights
        assert store is not None
        if weights is not None:
            weights.take()  # a pass that did not go backward may have put them away
        stays: set[int] = set()
        # Tensors that several operations keep are put away once. They live until the layer is done, so that
        # no other one can take their address meanwhile.
        known: dict[tuple[Any, ...], tuple[Tensor, _PutAway]] = {}
        goes_backward = False

        def pack(tensor: Tensor) -> Tensor | _PutAway:
            nonlocal goes_backward
            goes_backward = True
            if not stays:  # asked only now: fully sharded weights are whole while the layer runs, and not before
                stays.update({param.untyped_storage().data_ptr() for param in layer.parameters()} | self.shared)
            storage = tensor.untyped_storage()
            repeats = storage.nbytes() < tensor.numel() * tensor.element_size()  # expanded
            if not with_activations or repeats or tensor.numel() < SMALLEST or storage.data_ptr() in stays:
                return tensor
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
            if key not in known:
                known[key] = tensor, _PutAway(store, tensor)
                luggage.activations.append(known[key][1])
            return known[key][1]

        def unpack(packed: Tensor | _PutAway) -> Tensor:
            luggage.open()
            return packed.take() if isinstance(packed, _PutAway) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        known.clear()
        if weights is not None and goes_backward:
            weights.put_away()
