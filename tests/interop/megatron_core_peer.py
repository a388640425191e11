"""Runs inside an environment that has another release of Megatron-Core: writes a checkpoint, or reads one of ours.

    python megatron_core_peer.py write DIRECTORY PORT      (RANK and WORLD_SIZE in the environment; tensor parallel)
    python megatron_core_peer.py read DIRECTORY PORT

A writer of one rank leaves `tensors.pt` beside the directory, a reader `tensors_<rank>.pt`: parameters by name, and
under `moment.<name>` their first moment. Imports nothing of this repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

if not torch.cuda.is_available():  # what the peer asks of the device while it saves, answered for a CPU
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 12,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
}
VOCAB, LENGTH = 24, 4


def build_model() -> GPTModel:
    """A tiny GPT on this tensor parallel rank."""
    config = TransformerConfig(
        **SIZES,
        use_cpu_initialization=True,
        tensor_model_parallel_size=dist.get_world_size(),
    )
    torch.manual_seed(11)
    return GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH)


def make_optimizer(model: GPTModel) -> torch.optim.Optimizer:
    """AdamW that has taken a step with gradients that tell the places of their elements."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, param in enumerate(model.parameters()):
        param.grad = torch.sin(torch.arange(param.numel(), dtype=torch.float32) + number).reshape(param.shape)
    optimizer.step()
    return optimizer


def flattened_moment(key: str) -> ShardedTensor:
    """A matrix cut over tensor parallel ranks whose parts are flattened, as distributed optimizers do."""
    rank, size = dist.get_rank(), dist.get_world_size()
    part = torch.arange(12.0 * 16).reshape(12, 16).chunk(size)[rank].reshape(-1)
    shape = (12 // size, 16)
    return ShardedTensor.from_rank_offsets_flat(
        key, part.clone(), shape, (0, rank, size), flattened_range=slice(0, part.numel())
    )


def contents(model: GPTModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict with every kind of value that checkpoints hold."""
    model_state = model.sharded_state_dict()
    optimizer_state = optimizer.state_dict()
    steps = {number: state.pop("step") for number, state in optimizer_state["state"].items()}
    sharded = get_param_id_to_sharded_param_map(model_state, model.parameters())
    optim_state_to_sharding_state(optimizer_state, sharded)
    optimizer_state["state"]["common_step"] = steps[0]
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "flat": flattened_moment("optimizer.state.flat.matrix"),
        "rng_state": ShardedObject(
            f"rng_state_{size}", [{"torch_rng_state": torch.arange(4) + rank}], (1, size), (0, rank)
        ),
        "iteration": 7,
        "checkpoint_version": 3.0,
    }


def write(directory: Path) -> None:
    """Write a checkpoint, and with one rank the tensors it must hold."""
    model = build_model()
    optimizer = make_optimizer(model)
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(contents(model, optimizer), str(directory), content_metadata={"kind": "test"})
    if dist.get_world_size() == 1:
        state = optimizer.state_dict()["state"]
        names = [name for name, _ in model.named_parameters()]
        torch.save(
            {**plain(model), **{f"moment.{name}": state[i]["exp_avg"] for i, name in enumerate(names)}},
            directory.parent / "tensors.pt",
        )


def read(directory: Path) -> None:
    """Load a checkpoint into a model that has other values, and keep what it then holds."""
    model = build_model()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(-1.0)
    optimizer = make_optimizer(model)
    request = contents(model, optimizer)
    request["flat"].data.fill_(-1.0)
    loaded = dist_checkpointing.load(request, str(directory))
    model.load_state_dict(loaded["model"])
    assert loaded["iteration"] == 7, loaded["iteration"]
    rank, size = dist.get_rank(), dist.get_world_size()
    expected = torch.arange(12.0 * 16).reshape(12, 16).chunk(size)[rank].reshape(-1)
    assert torch.equal(loaded["flat"], expected), "flattened tensor"
    result = {**plain(model), **{f"moment.{n}": s["exp_avg"] for n, s in moments(loaded, model).items()}}
    torch.save(result, directory.parent / f"tensors_{rank}.pt")


def moments(loaded: dict[str, Any], model: GPTModel) -> dict[str, dict[str, torch.Tensor]]:
    """Loaded optimizer state by parameter name."""
    state = loaded["optimizer"]["state"]
    return {name: state[number] for number, (name, _) in enumerate(model.named_parameters())}


def plain(model: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def main() -> None:
    action, directory, port = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(size, 1)
    {"write": write, "read": read}[action](directory)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
