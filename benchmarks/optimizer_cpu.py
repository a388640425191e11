"""CPU time of Adam's update: clipping, torch's fused kernel and rounding one after the other, and one compiled kernel.

    python benchmarks/optimizer_cpu.py --output benchmarks/results/optimizer_cpu.json

GPT-2's shapes, gradients in fp32 that are to be clipped, one process, one thread. Each time includes the norm, which
all compute alike. The contenders take turns on the same tensors. Low-precision state is that of `--exp-avg-dtype` and
`--exp-avg-sq-dtype`, with fp32 main weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, copy_bandwidth, say, take_turns, write_result
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import sum_of_squares
from megatron.core.optimizer.fused_adam import AdamState, update
from megatron.core.optimizer.precision_aware_adam import PrecisionAwareAdam

SIZES = {"30M": (6, 384), "124M": (12, 768)}
VOCABULARY, LENGTH = 50304, 1024
GROUP: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 0.999
MOMENTS = {"bf16": torch.bfloat16, "fp8": torch.uint8}


def shapes(layers: int, hidden: int) -> list[tuple[int, ...]]:
    """Of the parameters of GPT-2 with tied embeddings."""
    norm: list[tuple[int, ...]] = [(hidden,), (hidden,)]
    attention: list[tuple[int, ...]] = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    mlp: list[tuple[int, ...]] = [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    return [(VOCABULARY, hidden), (LENGTH, hidden), *(norm + attention + norm + mlp) * layers, *norm]


def states_of(size: str, *, half: bool) -> list[AdamState]:
    """Of a run that begins."""
    mains = [torch.randn(shape) * 0.02 for shape in shapes(*SIZES[size])]
    return [
        AdamState(
            main,
            torch.randn_like(main) * 1e-3,
            torch.zeros_like(main),
            torch.zeros_like(main),
            torch.zeros(()),
            main.bfloat16() if half else None,
        )
        for main in mains
    ]


def measure(size: str, *, half: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of both ways."""
    states = states_of(size, half=half)
    grads = [state.grad for state in states]

    def with_norm(work: Callable[[], None]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            norm = sum_of_squares(grads)
            work()
            return norm

        return run

    found = take_turns(
        {
            "plain": with_norm(lambda: update(states, GROUP, CLIP, compile_it=False)),
            "compiled": with_norm(lambda: update(states, GROUP, CLIP, compile_it=True)),
            "norm": lambda: sum_of_squares(grads),
        },
        rounds,
        warmup=2,
    )
    return {
        "size": size,
        "type": "bf16" if half else "fp32",
        "parameters": sum(grad.numel() for grad in grads),
        "milliseconds": {name: seconds * 1e3 for name, seconds in found.medians().items()},
        "times_as_fast": found.times_as_fast("compiled", "plain"),
    }


def measure_low_precision(name: str, rounds: int) -> dict[str, Any]:
    """Nanoseconds a parameter of state in another type, 4 million of them, plain and compiled."""
    weights = (torch.randn(2**22) * 0.02).bfloat16()
    ways = {"plain": False, "compiled": True}
    contenders = {way: optimizer_of(weights.clone(), MOMENTS[name], compile_it=on) for way, on in ways.items()}
    found = take_turns({way: optimizer.step for way, optimizer in contenders.items()}, rounds, warmup=2)
    return {
        "moments": name,
        "nanoseconds": {way: seconds / weights.numel() * 1e9 for way, seconds in found.medians().items()},
        "times_as_fast": found.times_as_fast("compiled", "plain"),
    }


def optimizer_of(weights: Tensor, moments: torch.dtype, *, compile_it: bool) -> PrecisionAwareAdam:
    """Over one piece, which has a gradient."""
    config = OptimizerConfig(
        lr=GROUP["lr"],
        weight_decay=GROUP["weight_decay"],
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=True,
        store_param_remainders=False,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        torch_compile=compile_it,
    )
    optimizer = PrecisionAwareAdam([{"params": [weights]}], config)
    optimizer.adopt(weights, 0, on_host=False)
    weights.decoupled_grad = torch.randn(weights.numel()) * 1e-3  # type: ignore[attr-defined]
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizer_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for size in args.sizes:
        for half in (False, True):
            results.append(measure(size, half=half, rounds=args.rounds))
            say(results[-1])
    low = [measure_low_precision(name, args.rounds) for name in MOMENTS]
    say(low)
    write_result(args.output, results=results, low_precision=low, gigabytes_per_second=copy_bandwidth() / 1e9)


if __name__ == "__main__":
    main()
