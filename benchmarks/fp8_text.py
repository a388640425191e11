"""A small GPT trained with linear layers in fp8, in each way of scaling, beside bf16, on real text.

    OMP_NUM_THREADS=1 python benchmarks/fp8_text.py FOLDER --output benchmarks/results/fp8_text.json

The corpus of examples/data, a byte-pair vocabulary learned from it, the same weights, batches and schedule for all. On
a CPU the products are emulated: the numbers are those of fp8, the seconds are not. Models that the output file has
already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import write_result
from benchmarks.sparse_text import data, run

VOCABULARY = 2048
COMMON = """
    --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 --swiglu --normalization RMSNorm
    --disable-bias-linear --seq-length 128 --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 8 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --adam-beta2 0.95 --split 90,10,0 --num-workers 0 --log-interval 10 --eval-iters 40
    --no-progress-bar --seed 1
""".split()
SCALINGS = ("delayed", "tensorwise", "blockwise", "mxfp8")
HISTORY = ["--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max"]
FP8 = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe"]
MODELS: dict[str, list[str]] = {"bf16": ["--bf16"], "fp32": []} | {
    name: [*FP8, name, *(HISTORY if name == "delayed" else ())] for name in SCALINGS
}
"""fp32 shows how far curves part that nobody would tell apart."""
SHAPE = ["--num-layers", "2", "--position-embedding-type", "rope"]
LAST = 5
"""Log lines whose losses are averaged at the end."""


def train(name: str, folder: Path, data_flags: list[str], steps: int) -> dict[str, Any]:
    """Losses of one model."""
    metrics = folder / f"{name}.jsonl"
    metrics.unlink(missing_ok=True)
    length = ["--train-iters", str(steps), "--eval-interval", str(steps), "--metrics-jsonl", str(metrics)]
    run("pretrain_gpt.py", *COMMON, *SHAPE, *MODELS[name], *data_flags, *length)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = {row["iteration"]: row["lm loss"] for row in rows if "lm loss" in row}
    validation = [row["lm loss validation"] for row in rows if "lm loss validation" in row]
    return {"flags": " ".join(MODELS[name]), "losses": losses, "validation": validation[-1]}


def at_the_end(found: dict[str, Any]) -> float:
    """Mean training loss of the last log lines."""
    return mean(list(found["losses"].values())[-LAST:])


def main() -> None:
    """Train all that are missing, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to add the numbers to")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    models = result.get("models", {})
    data_flags = data(args.folder, VOCABULARY)
    for name in args.models:
        if name in models:
            continue
        models[name] = train(name, args.folder, data_flags, args.steps)
        common = " ".join([*COMMON, *SHAPE])
        write_result(args.output, settings={"steps": args.steps, "common flags": common}, models=models)
    for name, found in models.items():
        ratio = at_the_end(found) / at_the_end(models["bf16"]) if "bf16" in models else float("nan")
        validation = found["validation"] / models["bf16"]["validation"] if "bf16" in models else float("nan")
        print(
            f"{name:10} training loss {at_the_end(found):.4f} ({ratio - 1:+.2%} beside bf16), "
            f"validation {found['validation']:.4f} ({validation - 1:+.2%})"
        )


if __name__ == "__main__":
    main()
