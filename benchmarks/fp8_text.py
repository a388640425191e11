"""A small GPT trained with linear layers in fp8, in each way of scaling, beside bf16, on real text.

    OMP_NUM_THREADS=1 python benchmarks/fp8_text.py FOLDER --output benchmarks/results/fp8_text.json

The corpus of examples/data, a byte-pair vocabulary learned from it; for each seed the same weights, batches and
schedule for all. fp32 shows how far curves part that nobody would tell apart, other seeds how far runs do anyway. On
a CPU the products are emulated: the numbers are those of fp8, the seconds are not. Runs that the output file has
already are not repeated, so that a run that was cut short goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import write_result
from benchmarks.render import beside_bf16
from benchmarks.sparse_text import data, run

VOCABULARY = 2048
COMMON = """
    --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 --swiglu --normalization RMSNorm
    --disable-bias-linear --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 8 --global-batch-size 8 --lr-decay-style cosine
    --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 --split 90,10,0 --num-workers 0 --log-interval 10
    --eval-iters 40 --no-progress-bar
""".split()
SETTINGS = {
    "2 layers": "--num-layers 2 --lr 1e-3 --min-lr 1e-4".split(),
    "4 layers, three times the rate": "--num-layers 4 --lr 3e-3 --min-lr 3e-4".split(),
}
HISTORY = ["--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max"]


def in_fp8(number_format: str, recipe: str) -> list[str]:
    """Flags of a way of scaling."""
    flags = ["--bf16", "--fp8-format", number_format, "--fp8-recipe", recipe]
    return flags + (HISTORY if recipe == "delayed" else [])


MODELS: dict[str, list[str]] = {
    "bf16": ["--bf16"],
    "fp32": [],
    "delayed": in_fp8("hybrid", "delayed"),
    "tensorwise": in_fp8("hybrid", "tensorwise"),
    "blockwise": in_fp8("hybrid", "blockwise"),
    "mxfp8": in_fp8("hybrid", "mxfp8"),
    "delayed, e4m3": in_fp8("e4m3", "delayed"),
    "mxfp8, e4m3": in_fp8("e4m3", "mxfp8"),
}
SPAN = 10
"""Steps whose losses are one number of a curve."""


def train(name: str, setting: str, seed: int, folder: Path, data_flags: list[str], steps: int) -> dict[str, Any]:
    """The curve of a run, and its loss on text that was held out."""
    metrics = folder / f"{os.getpid()}.jsonl"
    length = ["--train-iters", str(steps), "--eval-interval", str(steps), "--metrics-jsonl", str(metrics)]
    flags = [*COMMON, *SETTINGS[setting], *MODELS[name], "--seed", str(seed)]
    run("pretrain_gpt.py", *flags, *data_flags, *length)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.unlink()
    losses = [row["lm loss"] for row in rows if "lm loss" in row]
    curve = [round(mean(losses[i : i + SPAN]), 5) for i in range(0, len(losses), SPAN)]
    validation = [row["lm loss validation"] for row in rows if "lm loss validation" in row]
    return {"curve": curve, "validation": validation[-1]}


def main() -> None:
    """Train what is missing, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to add the numbers to")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
    data_flags = data(args.folder, VOCABULARY)
    settings = {"steps": args.steps, "steps in a number of a curve": SPAN, "common flags": " ".join(COMMON)}
    for setting in args.settings:
        runs = found.setdefault(setting, {"flags": " ".join(SETTINGS[setting]), "models": {}})["models"]
        for seed in args.seeds:
            for name in args.models:
                of_seeds = runs.setdefault(name, {"flags": " ".join(MODELS[name]), "seeds": {}})["seeds"]
                if str(seed) not in of_seeds:
                    of_seeds[str(seed)] = train(name, setting, seed, args.folder, data_flags, args.steps)
                    write_result(args.output, settings=settings, runs=found)
    for setting, entry in found.items():
        report(setting, entry["models"])


def report(setting: str, runs: dict[str, Any]) -> None:
    """Differences from bf16, seed by seed."""
    for name in runs:
        pairs = zip(*beside_bf16(runs, name))
        shown = "  ".join(f"{trained:+.2%} / {validation:+.2%}" for trained, validation in pairs)
        print(f"{setting}, {name}: training / validation loss beside bf16, a seed each: {shown}")


if __name__ == "__main__":
    main()
