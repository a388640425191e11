"""A mixture of experts on a CPU beside that of transformers, and a dense block of equal active width: both passes.

    OMP_NUM_THREADS=1 python benchmarks/moe_cpu.py --output benchmarks/results/moe_cpu.json

Same weights, same input, and results that are checked to be equal (the dense block computes something else: it shows
what routing costs). Processor time, the contenders in turn, medians; and the bytes that autograd keeps in between. On a
GPU (`--device cuda`) elapsed time is taken instead, after synchronising.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS, TOP = 8, 2
SHAPES = (
    {"hidden": 256, "inner": 512, "tokens": 512},
    {"hidden": 512, "inner": 1024, "tokens": 1024},
    {"hidden": 512, "inner": 1792, "tokens": 2048},
)


def our_block(shape: dict[str, int], kind: str) -> Any:
    """Experts as a stack ("grouped"), one after the other, or a dense block of the width that a token sees."""
    experts: dict[str, Any] = {
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": shape["inner"],
        "moe_router_topk": TOP,
        "moe_grouped_gemm": kind == "grouped",
    }
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape["hidden"],
        num_attention_heads=8,
        ffn_hidden_size=TOP * shape["inner"],
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=silu,
        bias_activation_fusion=True,
        gradient_accumulation_fusion=False,
        **({} if kind == "dense" else experts),
    )
    spec = get_gpt_layer_local_spec(None if kind == "dense" else EXPERTS, moe_grouped_gemm=kind == "grouped")
    with deferred_initialization():
        block = build_module(spec.submodules.mlp, config=config)
    initialize_parameters(block, seed=0)
    return block


def their_block(shape: dict[str, int], ours: Any, implementation: str) -> nn.Module:
    """With the weights of our experts one after the other."""
    config = transformers.MixtralConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    experts = ours.experts.local_experts
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(torch.stack([expert.linear_fc1.weight for expert in experts]))
        block.experts.down_proj.copy_(torch.stack([expert.linear_fc2.weight for expert in experts]))
    return block


def contenders(shape: dict[str, int], device: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward pass."""
    x = torch.randn(shape["tokens"], 1, shape["hidden"], device=device, requires_grad=True)
    ours = {f"ours, {kind}": our_block(shape, kind).to(device) for kind in ("grouped", "sequential", "dense")}
    theirs = {"transformers, eager": their_block(shape, ours["ours, sequential"], "eager").to(device)}
    passes: dict[str, Callable[[], Tensor]] = {}
    for name, block in ours.items():
        passes[name] = lambda block=block: block(x)[0]  # type: ignore[misc]
    for name, module in theirs.items():
        passes[name] = lambda module=module: module(x)  # type: ignore[misc]
    return passes


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """That autograd stores, parameters included for all alike."""
    stored: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in stored.values())


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, elapsed on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(shape: dict[str, int], rounds: int, device: str) -> dict[str, Any]:
    """Medians of one shape.

    Raises:
        AssertionError: the contenders compute different things.
    """
    passes = contenders(shape, device)
    expected = passes["ours, sequential"]()
    for name, forward in passes.items():
        if name != "ours, dense":
            torch.testing.assert_close(forward(), expected, rtol=1e-3, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, forward in passes.items():
            start = clock(device)
            forward().sum().backward()
            times[name].append(clock(device) - start)
    seconds = {name: statistics.median(measured[1:]) for name, measured in times.items()}
    return {
        **shape,
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "kept_mb": {name: kept_bytes(forward) / 2**20 for name, forward in passes.items()},
        "times_faster": seconds["transformers, eager"] / seconds["ours, grouped"],
        "over_dense": seconds["ours, grouped"] / seconds["ours, dense"],
    }


def main() -> None:
    """Measure, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        row = measure(dict(shape), args.rounds, args.device)
        rows.append(row)
        print(*(f"{name} {value}" for name, value in shape.items()), sep=", ")
        for name, milliseconds in row["milliseconds"].items():
            print(f"  {name:22} {milliseconds:9.1f} ms {row['kept_mb'][name]:9.1f} MiB kept")
        print(
            f"  {row['times_faster']:.2f} times as fast as transformers, {row['over_dense']:.2f} times the dense block"
        )
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "device": args.device}
        capability = torch.backends.cpu.get_cpu_capability()
        args.output.write_text(json.dumps({**versions, "capability": capability, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
