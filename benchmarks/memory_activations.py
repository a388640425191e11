"""Bytes that one transformer layer keeps for backward, counted, beside the formulas of Korthikanti et al.
(arXiv:2205.05198, table 2).

    python benchmarks/memory_activations.py --output benchmarks/results/memory_activations.json

Counted is every tensor that autograd stores during the layer's forward pass, each piece of memory once, without the
weights: what a training step holds for each layer and microbatch until it goes backward. The layer is a GPT's, in
bf16 with dropout, as the formulas assume, with the scores in memory ("unfused"). Beside it, "sdpa" is what the default
attention keeps, without attention dropout, which torch's kernels for the CPU do not have. `tp` ranks run as gloo
processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.harness import write_result
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "core_attn layernorm": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    "core_attn layernorm mlp": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Shape:
    """Of the layer and its input."""

    sequence: int
    microbatch: int
    hidden: int
    heads: int

    @property
    def unit(self) -> int:
        """s b h, the paper's unit: elements of one activation."""
        return self.sequence * self.microbatch * self.hidden


def predicted(shape: Shape, tp: int, sequence_parallel: bool, recompute: str) -> float | None:
    """Bytes on each rank; None where the paper has no formula."""
    scores = 5 * shape.heads * shape.sequence / shape.hidden
    whole, cut = {"none": (10, 24 + scores), "selective": (10, 24), "full": (2, 0)}.get(recompute, (None, 0))
    if whole is None:
        return None
    return shape.unit * ((whole + cut) / tp if sequence_parallel else whole + cut / tp)


def count_bytes(shape: Shape, tp: int, sequence_parallel: bool, recompute: str, attention: str) -> int:
    """Bytes that one layer stores on this rank for backward; the groups exist."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        bf16=True,
        params_dtype=torch.bfloat16,
        attention_softmax_in_fp32=False,
        masked_softmax_fusion=True,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        attention_backend=AttnBackend.unfused if attention == "unfused" else AttnBackend.auto,
        attention_dropout=0.1 if attention == "unfused" else 0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        **RECOMPUTE[recompute],
    )
    spec = TransformerBlockSubmodules([get_gpt_layer_local_spec()])
    block = build_module(TransformerBlock, config, spec, post_layer_norm=False)
    rows = shape.sequence // tp if sequence_parallel else shape.sequence
    hidden = torch.randn(rows, shape.microbatch, shape.hidden).bfloat16().requires_grad_()
    weights = {param.untyped_storage()._cdata for param in block.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            stored[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = block(hidden, None)
    total = sum(storage.nbytes() for storage in stored.values())  # now: what was dropped since counts nothing
    output.float().sum().backward()
    return total


def measure(shape: Shape, tp: int) -> list[dict[str, Any]]:
    """All rows of one tensor parallel size; every rank of the world calls it."""
    rows = []
    for sequence_parallel in (False, True) if tp > 1 else (False,):
        for recompute in RECOMPUTE:
            expected = predicted(shape, tp, sequence_parallel, recompute)
            for attention in ("unfused", "sdpa"):
                found = count_bytes(shape, tp, sequence_parallel, recompute, attention)
                rows.append(
                    {
                        "tp": tp,
                        "sequence_parallel": sequence_parallel,
                        "recompute": recompute,
                        "attention": attention,
                        "bytes": found,
                        "bytes_per_sbh": found / shape.unit,
                        "formula_per_sbh": None if expected is None else expected / shape.unit,
                    }
                )
    return rows


def run_rank(rank: int, tp: int, shape: Shape, port: int, result: Any) -> None:
    """One process of a tensor parallel group."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, tp, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tp)
    rows = measure(shape, tp)
    if rank == 0:
        result.extend(rows)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]]) -> None:
    """One table, in units of s b h."""
    print(f"{'tp':>3} {'sp':>3}  {'recompute':24} {'attention':9} {'bytes/sbh':>10} {'formula':>8} {'ratio':>6}")
    for row in rows:
        formula = row["formula_per_sbh"]
        compared = f"{formula:8.2f} {row['bytes_per_sbh'] / formula:6.3f}" if formula else ""
        print(
            f"{row['tp']:3} {'yes' if row['sequence_parallel'] else 'no':>3}  {row['recompute']:24} "
            f"{row['attention']:9} {row['bytes_per_sbh']:10.2f} {compared}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="tensor parallel sizes")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    shape = Shape(args.sequence, args.microbatch, args.hidden, args.heads)
    rows: list[dict[str, Any]] = []
    with mp.Manager() as manager:
        for tp in args.sizes:
            result = manager.list()
            mp.spawn(run_rank, (tp, shape, 29600 + tp, result), nprocs=tp)
            rows.extend(result)
    show(rows)
    if args.output:
        write_result(args.output, shape=asdict(shape), type="bf16", rows=rows)


if __name__ == "__main__":
    main()
