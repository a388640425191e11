"""Causal attention with dropout on a CPU: by blocks, as `--attention-backend auto` takes it, beside torch's
scaled_dot_product_attention and the unfused core.

    OMP_NUM_THREADS=1 python benchmarks/attention_dropout_cpu.py --output benchmarks/results/attention_dropout_cpu.json

Processor time of forward and backward, the contenders in turn, medians; and the bytes that autograd keeps in between,
each piece of memory once, divided by those of q, k, v and the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.block_timing import kept_bytes, median_seconds
from benchmarks.harness import write_result
from megatron.core.fusions.blocked_attention import Rules, blocked_attention
from megatron.core.fusions.dropout import dropout
from megatron.core.fusions.fused_softmax import ScaledUpperTriangMaskedSoftmax

HEADS, WIDTH, P = 6, 64, 0.1
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By blocks."""
    seed = int(torch.randint(2**62, ()))
    return blocked_attention(q, k, v, Rules(WIDTH**-0.5, dropout_p=P, dropout_seed=seed))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch does with dropout on a CPU."""
    return scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores written out, one byte of dropout's mask for each."""
    scores = torch.matmul(q * WIDTH**-0.5, k.transpose(-1, -2))
    return dropout(ScaledUpperTriangMaskedSoftmax.apply(scores, 1.0), P, True) @ v


CONTENDERS: dict[str, Attention] = {"blocks": ours, "sdpa": sdpa, "unfused": unfused}


def measure(length: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender."""
    inputs = [torch.randn(1, HEADS, length, WIDTH).to(dtype).requires_grad_() for _ in range(3)]
    unit = 4 * inputs[0].numel() * inputs[0].element_size()
    passes = {name: partial(attend, *inputs) for name, attend in CONTENDERS.items()}
    seconds = median_seconds(passes, rounds, "cpu")
    return [
        {
            "sequence": length,
            "type": str(dtype).removeprefix("torch."),
            "attention": name,
            "milliseconds": 1e3 * seconds[name],
            "kept": kept_bytes(forward) / unit,
        }
        for name, forward in passes.items()
    ]


def main() -> None:
    """Measure, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in args.lengths:
            rows += measure(length, dtype, args.rounds)
            for row in rows[-len(CONTENDERS) :]:
                print("{sequence:6} {type:9} {attention:8} {milliseconds:9.1f} ms {kept:7.2f}".format(**row))
    if args.output:
        settings = {"heads": HEADS, "width": WIDTH, "dropout": P, "rounds": args.rounds}
        write_result(args.output, settings=settings, rows=rows)


if __name__ == "__main__":
    main()
