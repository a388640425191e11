"""Peak memory and speed of a training step of GPT-2 shapes at a vocabulary of 50304, by how output layer and loss are
computed.

    OMP_NUM_THREADS=1 python benchmarks/loss_memory_cpu.py --output benchmarks/results/loss_memory_cpu.json

Every contender of `train_cpu.py` that is named trains two steps in a process of its own; counted is how far the
resident memory rises above what the process had before the model was built. Then they take turns in one process, for
the tokens per second of CPU time (`--rounds 0`: not).
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import write_result
from benchmarks.train_cpu import CONTENDERS, SIZES, VOCAB, gpt_batches, measure
from benchmarks.training_steps import BATCH, LENGTH
from megatron.core.host_memory import keep_freed_memory

NAMES = ("ours", "ours, loss in pieces", "plain torch")


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def peak_of(name: str, size: str, number_type: str) -> int:
    """Bytes by which two training steps raise this process."""
    torch.randn(64, 64).mm(torch.randn(64, 64))
    before = resident()
    make, how = CONTENDERS[number_type][name]
    torch.manual_seed(1)
    step = make(SIZES[size], how)
    batches = gpt_batches(SIZES[size])
    for _ in range(2):
        step(*next(batches))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def in_a_process(*words: str) -> str:
    """The last word that this script prints with such arguments."""
    found = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.splitlines()[-1]


def speeds(size: str, number_type: str, rounds: int) -> dict[str, float]:
    """Tokens per second of CPU time."""
    keep_freed_memory()
    found = measure("gpt", SIZES[size], number_type, rounds, 1, list(NAMES))["contenders"]
    return {name: contender["tokens_per_second"] for name, contender in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SIZE", "TYPE"), help="only this, in this process")
    parser.add_argument("--speed", nargs=2, metavar=("SIZE", "TYPE"), help="only this, in this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    if args.one:
        print(peak_of(*args.one))
        return
    if args.speed:
        print(json.dumps(speeds(*args.speed, rounds=args.rounds)))
        return
    rows = []
    for size, number_type in itertools.product(args.sizes, CONTENDERS):
        fast: dict[str, float] = {}
        if args.rounds:
            fast = json.loads(in_a_process("--speed", size, number_type, "--rounds", str(args.rounds)))
        for name in NAMES:
            peak, speed = int(in_a_process("--one", name, size, number_type)), fast.get(name)
            row = {"contender": name, "size": size, "type": number_type, "peak bytes": peak, "tokens_per_second": speed}
            rows.append(row)
            print(f"{size:6}{number_type:6}{name:24}{peak / 2**20:8.0f} MiB {speed or 0.0:8.1f} tokens/s", flush=True)
    if args.output:
        settings = {"sequence": LENGTH, "microbatch": BATCH, "vocabulary": VOCAB}
        write_result(args.output, settings=settings, results=rows)


if __name__ == "__main__":
    main()
