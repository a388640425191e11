"""A hybrid of state space and attention layers beside a dense GPT of the same size, on real text, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/hybrid_text.py FOLDER --output benchmarks/results/hybrid_text.json

The corpus of examples/data, a byte-pair vocabulary learned from it, the same batches, optimizer and schedule for both;
parameters outside of embeddings differ by less than 2 %. Everything else is in FOLDER; finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 2048
COMMON = """
    --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 --swiglu --normalization RMSNorm
    --disable-bias-linear --seq-length 128 --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 8 --global-batch-size 8 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --adam-beta2 0.95 --split 90,10,0 --num-workers 0 --log-interval 10 --eval-iters 40
    --no-progress-bar --seed 1
""".split()
HYBRID = """
    --num-layers 7 --hybrid-override-pattern M-M*M-M --is-hybrid-model --position-embedding-type none
    --mamba-head-dim 32 --mamba-num-groups 1 --mamba-state-dim 64
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec
""".split()
MODELS: dict[str, tuple[str, list[str]]] = {
    "dense": ("pretrain_gpt.py", ["--num-layers", "4", "--position-embedding-type", "rope"]),
    "hybrid": ("pretrain_mamba.py", HYBRID),
}


def run(*words: str) -> None:
    """A program of this repository; its words go to its own log."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ)


def data(folder: Path) -> list[str]:
    """Flags of the tokenizer and the data set, which are made first."""
    corpus, vocab, prefix = folder / "corpus.jsonl", folder / "vocab", folder / "corpus"
    tokenizer = ["--tokenizer-type", "GPT2BPETokenizer"]
    tokenizer += ["--vocab-file", str(vocab / "vocab.json"), "--merge-file", str(vocab / "merges.txt")]
    if not (folder / "corpus_text_document.idx").exists():
        run("examples/data/corpus_to_jsonl.py", str(corpus))
        size = str(VOCABULARY)
        run("tools/train_bpe.py", "--input", str(corpus), "--vocab-size", size, "--output-dir", str(vocab))
        words = ["--input", str(corpus), "--output-prefix", str(prefix), *tokenizer, "--append-eod", "--workers", "1"]
        run("tools/preprocess_data.py", *words)
    return [*tokenizer, "--data-path", f"{prefix}_text_document"]


def train(name: str, folder: Path, data_flags: list[str], steps: int) -> dict[str, Any]:
    """Losses of one model."""
    program, flags = MODELS[name]
    metrics = folder / f"{name}.jsonl"
    metrics.unlink(missing_ok=True)
    length = ["--train-iters", str(steps), "--eval-interval", str(steps), "--metrics-jsonl", str(metrics)]
    start = time.perf_counter()
    run(program, *COMMON, *flags, *data_flags, *length)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = {row["iteration"]: row["lm loss"] for row in rows if "lm loss" in row}
    validation = [value for row in rows for key, value in row.items() if key == "lm loss validation"]
    return {"flags": " ".join(flags), "seconds": seconds, "losses": losses, "validation": validation[-1]}


def main() -> None:
    """Train both, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data_flags = data(args.folder)
    models = {name: train(name, args.folder, data_flags, args.steps) for name in MODELS}
    for name, found in models.items():
        last = list(found["losses"].values())[-1]
        print(f"{name:7} training loss {last:.4f}, validation loss {found['validation']:.4f}, {found['seconds']:.0f} s")
    if args.output:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {**versions, "steps": args.steps, "common flags": " ".join(COMMON), "models": models}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
