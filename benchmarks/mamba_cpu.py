"""A Mamba-2 mixer on a CPU beside that of transformers (its path without kernels): forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/mamba_cpu.py --output benchmarks/results/mamba_cpu.json

Same weights, same input, and results that are checked to be equal. Processor time, the contenders in turn, medians; and
the bytes that autograd keeps in between. Theirs is measured with several chunk sizes: the best one counts. Ours is
measured with the matrices of its chunks recomputed in backward (as `pretrain_mamba.py` does) and stored. Both project
in and out by the same products of matrices, which are measured alone too: they bound how many times as fast a mixer
can be, and the rest is compared without them. On a GPU (`--device cuda`) elapsed time is taken instead, after
synchronising.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from benchmarks.block_timing import figures, median_seconds, run
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.ssm import MambaMixer
from megatron.core.transformer.transformer_config import TransformerConfig

SHAPES = (
    {"hidden": 256, "groups": 1, "state": 64, "sequence": 512, "batch": 1},
    {"hidden": 512, "groups": 8, "state": 128, "sequence": 512, "batch": 1},
    {"hidden": 512, "groups": 1, "state": 128, "sequence": 1024, "batch": 1},
    {"hidden": 128, "groups": 1, "state": 128, "sequence": 2048, "batch": 1},
)
"""In the last one most of the work is the state space's."""
PRODUCTS = "the projections alone"
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
    one = ours["ours, stored"]
    passes[PRODUCTS] = lambda: one.out_proj(one.in_proj(x)[0][..., : one.sizes.inner])[0]
    return passes


def measure(shape: dict[str, int], rounds: int, device: str) -> dict[str, Any]:
    """Medians of one shape.

    Raises:
        AssertionError: the contenders compute different things.
    """
    passes = contenders(shape, device)
    expected = passes["ours, stored"]()
    for name, forward in passes.items():
        if name != PRODUCTS:
            torch.testing.assert_close(forward(), expected, rtol=1e-3, atol=1e-4)
    seconds = median_seconds(passes, rounds, device)
    best = min(seconds[name] for name in seconds if name.startswith("transformers"))
    ours = min(seconds[name] for name in seconds if name.startswith("ours"))
    return {
        **shape,
        **figures(passes, seconds),
        "times_faster": best / ours,
        "times_faster_at_most": best / seconds[PRODUCTS],
        "times_faster_without_projections": (best - seconds[PRODUCTS]) / (ours - seconds[PRODUCTS]),
    }


def summary(row: dict[str, Any]) -> str:
    """How the contenders compare."""
    whole, most = row["times_faster"], row["times_faster_at_most"]
    return (
        f"{whole:.1f} times as fast as the best of transformers ({most:.1f} if only the projections took time), "
        f"{row['times_faster_without_projections']:.1f} times without the projections"
    )


if __name__ == "__main__":
    run(__doc__, SHAPES, measure, summary, rounds=5)
