"""The whole gate: the tables of `gpu_gate`, then a small GPT beside itself in fp64 on the CPU, with its layers in CUDA
graphs, and through a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_gate import TOLERANCE, Outcome, relative, run_checks
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.transformer_config import TransformerConfig

LENGTH, VOCABULARY, WARMUP = 16, 64, 2


def small_model(device: str, seed: int, **settings: Any) -> GPTModel:
    """A GPT of two layers."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cuda_graph_warmup_steps=WARMUP,
        **settings,
    )
    torch.manual_seed(seed)
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, max_sequence_length=LENGTH).to(device)


def loss_and_gradients(model: GPTModel, number: int = 0) -> list[Tensor]:
    """Of one batch."""
    device = next(model.parameters()).device
    ids = ((torch.arange(2 * LENGTH, device=device) * 7 + number) % VOCABULARY).view(2, LENGTH)
    positions = torch.arange(LENGTH, device=device).expand(2, -1)
    loss = model(ids, positions, None, labels=ids.roll(-1, dims=1)).mean()
    for param in model.parameters():
        param.grad = None
    loss.backward()
    return [loss.detach(), *(param.grad.clone() for param in model.parameters() if param.grad is not None)]


def whole_model(device: str) -> Outcome:
    """The loss and all gradients of the device, beside fp64 on the CPU."""
    first, second = small_model(device, 1), small_model("cpu", 1)
    second.load_state_dict(first.state_dict())
    found, expected = loss_and_gradients(first), loss_and_gradients(second.double())
    return compared("a whole GPT", found, expected)


def layers_in_graphs(device: str) -> Outcome:
    """The same model on the same device, layers kernel by kernel and replayed."""
    if torch.device(device).type != "cuda":
        return Outcome("layers in CUDA graphs", "float32", said=f"missing: graphs of kernels on {device}")
    return graphs_beside_kernels(device)


def graphs_beside_kernels(device: str) -> Outcome:
    """Passes without graphs, one that captures, one that only replays."""
    graphed, plain = small_model(device, 1, enable_cuda_graph=True), small_model(device, 1)
    plain.load_state_dict(graphed.state_dict())
    for number in range(WARMUP + 2):
        found, expected = loss_and_gradients(graphed, number), loss_and_gradients(plain, number)
        outcome = compared("layers in CUDA graphs", found, expected)
        if not outcome.passed:
            outcome.said = f"pass {number}"
            return outcome
    graphs: Any = graphed.decoder.graphs
    assert isinstance(graphs, CudaGraphManager) and graphs.num_captured == len(graphed.decoder.layers)
    return outcome


def checkpoint_round_trip(device: str) -> Outcome:
    """What is saved of a model on the device is what another one loads."""
    first, second = (small_model(device, seed) for seed in (1, 2))
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(first.sharded_state_dict(), folder)
        second.load_state_dict(dist_checkpointing.load(second.sharded_state_dict(), folder))
    pairs = zip(first.state_dict().items(), second.state_dict().values())
    same = [a is None or torch.equal(a, b) for (name, a), b in pairs if isinstance(a, Tensor)]
    return Outcome("checkpoint, there and back", "float32", float(not all(same) or len(same) < 10), 0.0)


MODELS = (whole_model, checkpoint_round_trip, layers_in_graphs)
"""Graphs come last: a capture that fails can leave the device unfit for more."""


def run_gate(device: str) -> Iterator[Outcome]:
    """All checks; process groups exist."""
    yield from run_checks(device)
    yield from (tried(check, device) for check in MODELS)


def tried(check: Callable[[str], Outcome], device: str) -> Outcome:
    """What goes wrong is said in the outcome."""
    try:
        return check(device)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Outcome(check.__name__.replace("_", " "), "float32", said=said)


def compared(name: str, found: list[Tensor], expected: list[Tensor]) -> Outcome:
    """The largest difference; as many gradients as there are parameters, or an infinite one."""
    difference = max(map(relative, found, expected)) if len(found) == len(expected) > 10 else float("inf")
    return Outcome(name, "float32", difference, TOLERANCE[torch.float32])
