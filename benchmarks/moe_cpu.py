"""A mixture of experts on a CPU beside that of transformers, and a dense block of equal active width: both passes.

    OMP_NUM_THREADS=1 python benchmarks/moe_cpu.py --output benchmarks/results/moe_cpu.json

Same weights, same input, and results that are checked to be equal (the dense block computes something else: it shows
what routing costs). Processor time, the contenders in turn, medians; and the bytes that autograd keeps in between. On a
GPU (`--device cuda`) elapsed time is taken instead, after synchronising.
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
from torch.nn.functional import silu
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.block_timing import figures, median_seconds, run
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
    seconds = median_seconds(passes, rounds, device)
    return {
        **shape,
        **figures(passes, seconds),
        "times_faster": seconds["transformers, eager"] / seconds["ours, grouped"],
        "over_dense": seconds["ours, grouped"] / seconds["ours, dense"],
        "dense_times_faster": seconds["transformers, eager"] / seconds["ours, dense"],
    }


def summary(row: dict[str, Any]) -> str:
    """How the contenders compare."""
    return (
        f"{row['times_faster']:.2f} times as fast as transformers (a dense block {row['dense_times_faster']:.2f}), "
        f"{row['over_dense']:.2f} times the dense block"
    )


if __name__ == "__main__":
    run(__doc__, SHAPES, measure, summary, rounds=7)
