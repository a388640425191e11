"""Peak memory of a training step of GPT-2 shapes at a vocabulary of 50304, by how output layer and loss are computed.

    OMP_NUM_THREADS=1 python benchmarks/loss_memory_cpu.py --output benchmarks/results/loss_memory_cpu.json

Every contender of `train_cpu.py` that is named trains two steps in a process of its own; counted is how far the
resident memory rises above what the process had before the model was built.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import write_result
from benchmarks.train_cpu import CONTENDERS, SIZES, VOCAB, gpt_batches
from benchmarks.training_steps import BATCH, LENGTH

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SIZE", "TYPE"), help="only this, in this process")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    if args.one:
        print(peak_of(*args.one))
        return
    rows = []
    for size in args.sizes:
        for number_type in CONTENDERS:
            for name in NAMES:
                words = [sys.executable, __file__, "--one", name, size, number_type]
                found = int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
                rows.append({"contender": name, "size": size, "type": number_type, "peak bytes": found})
                print(f"{size:6}{number_type:6}{name:24}{found / 2**20:8.0f} MiB", flush=True)
    if args.output:
        settings = {"sequence": LENGTH, "microbatch": BATCH, "vocabulary": VOCAB}
        write_result(args.output, settings=settings, results=rows)


if __name__ == "__main__":
    main()
