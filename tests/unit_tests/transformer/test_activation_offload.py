"""Activations and weights that wait in host memory: the same numbers, and what is where when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core.host_store import CopyStore
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import activation_offload
from megatron.core.transformer.transformer_config import TransformerConfig

LENGTH, BATCH, HIDDEN = 16, 2, 32


class Depot:
    """A host store that keeps a record, and that fills what has been taken home with NaN."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.inside = CopyStore()
        self.bytes_in = 0

    def put(self, tensor: Tensor) -> Tensor:
        self.log.append(("put", tensor.numel()))
        self.bytes_in += tensor.numel() * tensor.element_size()
        return self.inside.put(tensor)

    def fetch(self, ticket: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.log.append(("fetch", ticket.numel()))
        fetched = self.inside.fetch(ticket, into)
        value = fetched.clone()
        if fetched.is_floating_point():
            fetched.fill_(torch.nan)  # nobody may read it before it has arrived
        if ticket.is_floating_point():
            ticket.fill_(torch.nan)  # nor fetch it twice
        return fetched, value

    def arrive(self, fetched: tuple[Tensor, Tensor]) -> Tensor:
        tensor, value = fetched
        return tensor.copy_(value)


def build(swiglu: bool = False, **settings: Any) -> GPTModel:
    model_parallel_cuda_manual_seed(1234)
    more: dict[str, Any] = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} if swiglu else {}
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        **more,
        **settings,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), 64, LENGTH, position_embedding_type="rope")


def train(model: GPTModel, steps: int = 2) -> list[Tensor]:
    ids = torch.randint(0, 64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    losses = []
    for _ in range(steps):
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        loss.backward()
        losses.append(loss.detach())
    return [torch.stack(losses), *(param.grad for param in model.parameters())]


def offloading(num_layers: int, activations: bool = True, weights: bool = False) -> dict[str, Any]:
    return {
        "cpu_offloading": True,
        "cpu_offloading_num_layers": num_layers,
        "cpu_offloading_activations": activations,
        "cpu_offloading_weights": weights,
    }


@pytest.fixture
def depot(monkeypatch: pytest.MonkeyPatch) -> Depot:
    depot = Depot()
    monkeypatch.setattr(activation_offload, "host_store", lambda: depot)
    monkeypatch.setattr(activation_offload, "SMALLEST", 64)
    return depot


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    "settings",
    [offloading(1), offloading(3), offloading(2, weights=True), offloading(3, activations=False, weights=True)],
    ids=["one layer", "three layers", "with weights", "weights only"],
)
def test_numbers_are_the_same_to_the_bit(settings: dict[str, Any], swiglu: bool, depot: Depot) -> None:
    expected = train(build(swiglu))
    assert depot.bytes_in == 0
    model = build(swiglu, **settings)
    torch.testing.assert_close(train(model), expected, rtol=0, atol=0)
    assert depot.bytes_in > 0
    counts = [sum(name == kind for name, _ in depot.log) for kind in ("put", "fetch")]
    assert counts[0] == counts[1]  # everything comes back, and once


def test_the_real_store_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "SMALLEST", 64)
    torch.testing.assert_close(train(build(**offloading(2, weights=True))), train(build()), rtol=0, atol=0)


def bytes_left_on_the_device(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that layers keep for backward where they were computed, weights not counted."""
    model = build(**settings)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}
    original = torch.autograd.graph.saved_tensors_hooks

    class Counting(original):
        def __init__(self, pack: Any, unpack: Any) -> None:
            def counted(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if isinstance(packed, Tensor) and packed.untyped_storage().data_ptr() not in weights:
                    kept[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
                return packed

            super().__init__(counted, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
    train(model, 1)
    monkeypatch.undo()
    return sum(kept.values())


def test_little_stays_on_the_device(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_bytes = LENGTH * BATCH * HIDDEN * 4
    left = bytes_left_on_the_device(offloading(3), monkeypatch)
    assert left < 1.15 * depot.bytes_in / 3  # three layers are away, one is here, and what is small
    assert depot.bytes_in > 3 * 10 * hidden_bytes


def test_a_layer_is_fetched_while_the_next_one_goes_backward(depot: Depot) -> None:
    model = build(**offloading(2))
    events: list[str] = []
    layers = model.decoder.layers
    for i, layer in enumerate(layers):
        layer.mlp.linear_fc2.weight.register_hook(lambda _, i=i: events.append(f"layer {i} goes backward"))
    puts_before: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: puts_before.append(len([e for e in depot.log if e[0] == "put"])))
    original = depot.fetch

    def fetch(ticket: Tensor, into: Tensor | None = None) -> Any:
        events.append("fetch")
        return original(ticket, into)

    depot.fetch = fetch  # type: ignore[method-assign]
    train(model, 1)
    assert puts_before[1] == puts_before[3]  # layers 2 and 3 keep theirs
    places = [events.index(f"layer {i} goes backward") for i in (3, 2, 1, 0)]
    assert "fetch" not in events[: places[0] + 1]
    # All that layer 1 needs is on its way when layer 2 has begun, what layer 0 needs when layer 1 has.
    assert all(event != "fetch" for event in events[places[3] :])
    assert events[: places[1]].count("fetch") == puts_before[1] - puts_before[0]
    assert events[: places[2]].count("fetch") == puts_before[1]


def test_weights_of_a_layer_are_gone_between_forward_and_backward(depot: Depot) -> None:
    model = build(**offloading(2, weights=True))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    loss = model(ids, torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids).mean()
    sizes = [
        sum(param.untyped_storage().nbytes() for param in layer.parameters()) > 0 for layer in model.decoder.layers
    ]
    assert sizes == [False, False, True, True]
    loss.backward()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), name


def test_a_pass_without_backward_is_made_good_by_the_next(depot: Depot) -> None:
    expected = train(build())
    model = build(**offloading(2, weights=True))
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    model(ids, torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids)  # dropped
    model_parallel_cuda_manual_seed(1234)
    torch.testing.assert_close(train(model), expected, rtol=0, atol=0)


def test_without_gradients_everything_stays(depot: Depot) -> None:
    model = build(**offloading(3, weights=True))
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    with torch.no_grad():
        model(ids, torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids)
    assert depot.log == []


def test_weights_in_a_flat_buffer_stay(depot: Depot) -> None:
    model = build(**offloading(2, activations=False, weights=True))
    params = list(model.decoder.layers.parameters())
    flat = torch.cat([param.detach().flatten() for param in params])
    for param, part in zip(params, flat.split([param.numel() for param in params])):
        param.data = part.view(param.shape)
    train(model, 1)
    assert depot.log == []


def test_nothing_to_move_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to move"):
        build(**offloading(2, activations=False, weights=False))
    with pytest.raises(ValueError, match=r"cpu_offloading_num_layers \(4\) must be below num_layers \(4\)"):
        build(**offloading(4))


def test_tensors_of_many_users_are_put_away_once(depot: Depot) -> None:
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, **offloading(1))
    offload = activation_offload.ActivationOffload(config)
    x = torch.randn(16, 16, requires_grad=True)
    shared = torch.randn(16, 16)
    layer = nn.Linear(16, 16)
    with offload.forward_pass([shared]).layer(0, layer):
        hidden = x * 2
        y = layer(hidden) + hidden.square() + hidden.sin() + x * shared
    assert [kind for kind, _ in depot.log] == ["put"]
    y.sum().backward()
    hidden = (2 * x).detach()
    torch.testing.assert_close(x.grad, 2 * (layer.weight.sum(0) + 2 * hidden + hidden.cos()) + shared)
