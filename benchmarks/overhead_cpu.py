"""What the training program costs besides forward, backward and optimizer: the share of a step outside their timers.

    OMP_NUM_THREADS=2 python benchmarks/overhead_cpu.py --output benchmarks/results/overhead_cpu.json

Runs pretrain_gpt.py (6 layers, hidden 384, sequence 512, microbatch 4, vocabulary 50304, made-up data) with its own
level-1 timers, logging, TensorBoard and the metrics file on, and reads its log.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, write_result

FLAGS = """
    --num-layers 6 --hidden-size 384 --num-attention-heads 6 --seq-length 512 --max-position-embeddings 512
    --micro-batch-size 4 --global-batch-size 4 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 50303 --attention-dropout 0 --hidden-dropout 0 --cross-entropy-loss-fusion
    --eval-iters 0 --log-interval 1 --timing-log-level 1 --num-workers 1 --no-progress-bar
""".split()
STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
PHASE = re.compile(r"^    (forward-backward|optimizer) \.+: \([\d.]+, ([\d.]+)\)", re.MULTILINE)


def measure(iterations: int) -> list[float]:
    """Share of each step that lies outside the two timers, the first two steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        logs = ["--tensorboard-dir", folder, "--metrics-jsonl", str(Path(folder) / "metrics.jsonl")]
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *FLAGS, "--train-iters", str(iterations), *logs]
        log = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shares = []
    for report in STEP.split(log)[1:]:
        if re.fullmatch(r"[\d.]+", report):
            step = float(report)
        else:
            inside = sum(float(milliseconds) for _, milliseconds in PHASE.findall(report))
            shares.append(1 - inside / step)
    return shares[2:]


def main() -> None:
    """Print the median share, and write it down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    shares = measure(args.iterations)
    median = statistics.median(shares)
    print(f"outside forward, backward and optimizer: {median:.2%} of a step (median of {len(shares)} steps)")
    if args.output:
        write_result(args.output, share_outside=shares)


if __name__ == "__main__":
    main()
