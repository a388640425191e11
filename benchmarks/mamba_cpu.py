"""A Mamba-2 mixer on a CPU beside that of transformers (its path without kernels): forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/mamba_cpu.py --output benchmarks/results/mamba_cpu.json

Same weights, same input, and results that are checked to be equal. Processor time, the contenders in turn, medians; and
the bytes that autograd keeps in between. Theirs is measured with several chunk sizes: the best one counts. Ours is
measured with the matrices of its chunks recomputed in backward (as `pretrain_mamba.py` does) and stored. On a GPU
(`--device cuda`) elapsed time is taken instead, after synchronising.
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
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.ssm import MambaMixer
from megatron.core.transformer.transformer_config import TransformerConfig

SHAPES = (
    {"hidden": 256, "groups": 1, "state": 64, "sequence": 512, "batch": 1},
    {"hidden": 512, "groups": 8, "state": 128, "sequence": 512, "batch": 1},
    {"hidden": 512, "groups": 1, "state": 128, "sequence": 1024, "batch": 1},
)
HEAD_DIM = 64
THEIR_CHUNKS = (64, 128)


def our_mixer(shape: dict[str, int], recompute: bool) -> MambaMixer:
    """With initial weights of seed 0."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape["hidden"],
        num_attention_heads=1,
        mamba_head_dim=HEAD_DIM,
        mamba_num_groups=shape["groups"],
        mamba_state_dim=shape["state"],
        use_mamba_mem_eff_path=recompute,
        gradient_accumulation_fusion=False,
    )
    torch.manual_seed(0)
    parts = mamba_stack_spec.submodules.mamba_layer.submodules.mixer.submodules
    return MambaMixer(config, parts, shape["hidden"])


def their_mixer(shape: dict[str, int], chunk: int, weights: dict[str, Tensor]) -> nn.Module:
    """With our weights: names and shapes are the same."""
    config = transformers.Mamba2Config(
        num_heads=2 * shape["hidden"] // HEAD_DIM,
        head_dim=HEAD_DIM,
        hidden_size=shape["hidden"],
        state_size=shape["state"],
        n_groups=shape["groups"],
        num_hidden_layers=1,
        chunk_size=chunk,
    )
    mixer = Mamba2Mixer(config, 0)
    mixer.load_state_dict(weights)
    return mixer


def contenders(shape: dict[str, int], device: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward pass, the sequence first."""
    x = torch.randn(shape["sequence"], shape["batch"], shape["hidden"], device=device, requires_grad=True)
    ours = {
        name: our_mixer(shape, name == "ours, recomputed").to(device) for name in ("ours, recomputed", "ours, stored")
    }
    weights = {name: value for name, value in ours["ours, stored"].state_dict().items() if value is not None}
    theirs = {f"transformers, chunks of {n}": their_mixer(shape, n, weights).to(device) for n in THEIR_CHUNKS}
    passes: dict[str, Callable[[], Tensor]] = {}
    for name, mixer in ours.items():
        passes[name] = lambda mixer=mixer: mixer(x)[0]  # type: ignore[misc]
    for name, mixer in theirs.items():
        passes[name] = lambda mixer=mixer: mixer(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[misc]
    return passes


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """That autograd stores, parameters left out of account by both alike."""
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
    expected = passes["ours, stored"]()
    for forward in passes.values():
        torch.testing.assert_close(forward(), expected, rtol=1e-3, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, forward in passes.items():
            start = clock(device)
            forward().sum().backward()
            times[name].append(clock(device) - start)
    seconds = {name: statistics.median(measured[1:]) for name, measured in times.items()}
    best = min(seconds[name] for name in seconds if name.startswith("transformers"))
    return {
        **shape,
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "kept_mb": {name: kept_bytes(forward) / 2**20 for name, forward in passes.items()},
        "times_faster": best / seconds["ours, recomputed"],
    }


def main() -> None:
    """Measure, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        row = measure(dict(shape), args.rounds, args.device)
        rows.append(row)
        print(*(f"{name} {value}" for name, value in shape.items()), sep=", ")
        for name, milliseconds in row["milliseconds"].items():
            print(f"  {name:28} {milliseconds:9.1f} ms {row['kept_mb'][name]:9.1f} MiB kept")
        print(f"  {row['times_faster']:.1f} times as fast as the best of transformers")
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions |= {"python": platform.python_version(), "threads": torch.get_num_threads(), "device": args.device}
        capability = torch.backends.cpu.get_cpu_capability()
        args.output.write_text(json.dumps({**versions, "capability": capability, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
