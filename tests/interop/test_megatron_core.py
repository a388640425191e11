"""Checkpoints of another Megatron-Core release load here, and ours load there.

The exchange itself needs an environment with the PyPI package `megatron-core`:

    python -m venv peer && peer/bin/pip install torch megatron-core==0.13.1 psutil 'numpy<2'
    MEGATRON_CORE_PEER=peer/bin/python bash tests/run.sh tests/interop/test_megatron_core.py

Without it, one checkpoint that such a release wrote (`data/megatron_core_0.13.1.tar.xz`) is read.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, set_initialization_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.checkpoint.extra_state import empty_extra_states
from tests.worker_pool import run_ranks

PEER = os.environ.get("MEGATRON_CORE_PEER")
SCRIPT = Path(__file__).with_name("megatron_core_peer.py")
FIXTURE = Path(__file__).parent / "data" / "megatron_core_0.13.1.tar.xz"
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
VOCAB, LENGTH = 24, 4

needs_peer = pytest.mark.skipif(PEER is None, reason="MEGATRON_CORE_PEER names no python with megatron-core")


# ---- our side ----


def build(tp: int, pp: int) -> GPTModel:
    parallel_state.initialize_model_parallel(tp, pp)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    set_initialization_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=12,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
    )
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH, first, last)


def contents(model: GPTModel) -> dict[str, Any]:
    """The same kinds of values as on the other side."""
    model_state = model.sharded_state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for param in model.parameters():
        param.grad = torch.cos(torch.arange(param.numel(), dtype=torch.float32)).reshape(param.shape)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    with torch.no_grad():
        for param, value in zip(model.parameters(), before):
            param.copy_(value)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        step = entry.pop("step")
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(model_state, model.parameters()))
    state["state"]["common_step"] = step
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    part = torch.arange(12.0 * 16).reshape(12, 16).chunk(tp)[rank].reshape(-1)
    flat = ShardedTensor.from_rank_offsets_flat(
        "optimizer.state.flat.matrix",
        part.clone(),
        (12 // tp, 16),
        (0, rank, tp),
        flattened_range=slice(0, part.numel()),
        replica_id=(stage, 0, 0),
    )
    return {"model": model_state, "optimizer": state, "flat": flat, "iteration": 7, "checkpoint_version": 3.0}


def load_here(directory: str, again: str, tp: int, pp: int) -> None:
    """Load into a model of that layout, check what tells its place, and save what it holds."""
    model = build(tp, pp)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(-1.0)
    request = contents(model)
    for value in (request["flat"], *request["optimizer"]["state"][0].values()):
        value.data.fill_(-1.0)
    loaded = dist_checkpointing.load(request, directory, strict="raise_unexpected")
    assert loaded["iteration"] == 7 and loaded["optimizer"]["state"]["common_step"] == 1
    dist_checkpointing.save(request, again)


def write_here(directory: str, tp: int, pp: int) -> None:
    model = build(tp, pp)
    state = contents(model)
    state["extra_states"] = empty_extra_states(state["model"])
    if dist.get_rank() == 0:  # the reader asks for the random state of its own layout, one rank
        state["rng"] = ShardedObject("rng_state_1", [{"torch_rng_state": torch.arange(4)}], (1, 1), (0, 0))
    dist_checkpointing.save(state, directory)


def stored_names(name: str) -> str:
    """Name in a checkpoint of a parameter of the peer's model."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def assert_holds(directory: Path, reference: dict[str, torch.Tensor]) -> None:
    """The checkpoint has every parameter and moment of `reference`, bit for bit."""
    tensors = dist_checkpointing.load_plain_tensors(directory)
    assert torch.equal(tensors["optimizer.state.flat.matrix"].reshape(12, 16), torch.arange(192.0).reshape(12, 16))
    for name, value in reference.items():
        moment, plain = name.startswith("moment."), stored_names(name.removeprefix("moment."))
        key, layer = plain, None
        if ".layers." in plain:
            head, _, tail = plain.partition(".layers.")
            layer, _, rest = tail.partition(".")
            key = f"{head}.layers.{rest}"
        found = tensors[f"optimizer.state.exp_avg.{key}" if moment else key]
        assert torch.equal(found if layer is None else found[int(layer)], value), name


def check_loading(directory: Path, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert_holds(directory, reference)
    for tp, pp in LAYOUTS:
        again = tmp_path / f"again_{tp}_{pp}"
        again.mkdir()
        run_ranks(tp * pp, load_here, str(directory), str(again), tp, pp)
        assert_holds(again, reference)


def test_a_checkpoint_of_another_release_loads_into_every_layout(tmp_path: Path) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    reference = torch.load(tmp_path / "tensors.pt", weights_only=True)
    assert len(reference) > 40
    check_loading(tmp_path / "checkpoint", reference, tmp_path)


# ---- the other side ----


def run_peer(action: str, directory: Path, ranks: int) -> None:
    """Run the peer's script on that many tensor parallel ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    quiet = {"TORCH_COMPILE_DISABLE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    processes = [
        subprocess.Popen(
            [str(PEER), str(SCRIPT), action, str(directory), port],
            env={**kept, **quiet, "RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)[-4000:]


@needs_peer
@pytest.mark.timeout(1800)
def test_what_the_peer_writes_loads_here(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    run_peer("write", tmp_path / "one" / "checkpoint", 1)
    reference = torch.load(tmp_path / "one" / "tensors.pt", weights_only=True)
    check_loading(tmp_path / "one" / "checkpoint", reference, tmp_path)
    (tmp_path / "two").mkdir()
    run_peer("write", tmp_path / "two" / "checkpoint", 2)
    tensors = dist_checkpointing.load_plain_tensors(tmp_path / "two" / "checkpoint")
    again = tmp_path / "two" / "again"
    again.mkdir()
    run_ranks(2, load_here, str(tmp_path / "two" / "checkpoint"), str(again), 1, 2)
    for key, value in dist_checkpointing.load_plain_tensors(again).items():
        assert torch.equal(value.reshape(tensors[key].shape), tensors[key]), key


@needs_peer
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_what_we_write_loads_there(tmp_path: Path, tp: int, pp: int) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    run_ranks(tp * pp, write_here, str(directory), tp, pp)
    run_peer("read", directory, 1)
    assert_holds(directory, torch.load(tmp_path / "tensors_0.pt", weights_only=True))
