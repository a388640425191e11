"""Mixtures of experts and hybrids with state spaces beside a dense GPT of equal active size, on real text, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/sparse_text.py FOLDER --output benchmarks/results/sparse_text.json

The corpus of examples/data and a byte-pair vocabulary learned from it; two processes, over which experts are spread;
the same batches, optimizer and schedule for all. The parameters that work on a token, without embeddings and experts
that are not chosen, differ by less than 2 %. Everything is in FOLDER; finished models are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.expert_load import entropies
from benchmarks.harness import write_result

VOCABULARY = 4096
LAST = 50
"""Iterations that the last training loss and the last loads are means of."""
COMMON = """
    --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 --swiglu --normalization RMSNorm
    --disable-bias-linear --seq-length 128 --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 8 --global-batch-size 16 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --adam-beta2 0.95 --split 90,10,0 --num-workers 0 --log-interval 1 --eval-iters 20
    --no-progress-bar --seed 1 --use-distributed-optimizer
""".split()
EXPERTS = """
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 176 --moe-router-topk-scaling-factor 2
    --moe-aux-loss-coeff 0.01 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-grouped-gemm
""".split()
"""Two experts of half the width: with weights that add up to 2 they start out as large as the dense block's halves."""
GPT = "--num-layers 4 --position-embedding-type rope".split()
HYBRID = """
    --num-layers 7 --is-hybrid-model --position-embedding-type none
    --mamba-head-dim 32 --mamba-num-groups 1 --mamba-state-dim 64
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec --hybrid-override-pattern
""".split()
MODELS: dict[str, tuple[str, list[str]]] = {
    "dense": ("pretrain_gpt.py", GPT),
    "experts": ("pretrain_gpt.py", [*GPT, *EXPERTS]),
    "hybrid": ("pretrain_mamba.py", [*HYBRID, "M-M*M-M"]),
    "hybrid with experts": ("pretrain_mamba.py", [*HYBRID, "MEM*MEM", *EXPERTS]),
}


def run(*words: str, log: Path = Path(os.devnull)) -> None:
    """A program of this repository; what it says goes to a file."""
    with log.open("w") as file:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=file, stderr=file, env=os.environ)


def data(folder: Path, vocabulary: int) -> list[str]:
    """Flags of the tokenizer and the data set, which are made first."""
    corpus, vocab, prefix = folder / "corpus.jsonl", folder / "vocab", folder / "corpus"
    tokenizer = ["--tokenizer-type", "GPT2BPETokenizer"]
    tokenizer += ["--vocab-file", str(vocab / "vocab.json"), "--merge-file", str(vocab / "merges.txt")]
    if not (folder / "corpus_text_document.idx").exists():
        log = folder / "data.log"
        run("examples/data/corpus_to_jsonl.py", str(corpus), log=log)
        sizes = ["--vocab-size", str(vocabulary), "--output-dir", str(vocab)]
        run("tools/train_bpe.py", "--input", str(corpus), *sizes, log=log)
        words = ["--input", str(corpus), "--output-prefix", str(prefix), *tokenizer, "--append-eod", "--workers", "1"]
        run("tools/preprocess_data.py", *words, log=log)
    return [*tokenizer, "--data-path", f"{prefix}_text_document"]


def train(name: str, folder: Path, data_flags: list[str], steps: int) -> dict[str, Any]:
    """Losses of one model, and loads of its experts."""
    program, flags = MODELS[name]
    own = folder / name.replace(" ", "_")
    own.mkdir(exist_ok=True)
    metrics, loads, finished = own / "metrics.jsonl", own / "loads", own / f"finished-{steps}.json"
    if finished.exists():
        return dict(json.loads(finished.read_text()))
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("benchmarks/expert_load.py", str(loads), program, *COMMON, *flags, *data_flags),
        *("--train-iters", str(steps), "--eval-interval", "100", "--metrics-jsonl", str(metrics)),
        log=own / "log",
    )
    found = {"flags": " ".join(flags), "seconds": time.perf_counter() - start, **summary(metrics, loads)}
    finished.write_text(json.dumps(found))
    return found


def summary(metrics: Path, loads: Path) -> dict[str, Any]:
    """Means of LAST training losses, validation losses, and the evenness of the loads of layers with experts."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["lm loss"] for row in rows if "lm loss" in row]
    means = {end: float(numpy.mean(losses[end - LAST : end])) for end in range(LAST, len(losses) + 1, LAST)}
    validation = {row["iteration"]: row["lm loss validation"] for row in rows if "lm loss validation" in row}
    found: dict[str, Any] = {"training loss": means, "validation loss": validation}
    balance = [row["load_balancing_loss"] for row in rows if "load_balancing_loss" in row]
    if balance:
        found["load balancing loss"] = {"first": balance[0], "last": float(numpy.mean(balance[-LAST:]))}
        found["entropy of load"] = {
            "first training batch": entropies(loads, "training", first=1),
            "last training batches": entropies(loads, "training", last=LAST),
            "validation": entropies(loads, "validation", last=20),
        }
    return found


def main() -> None:
    """Train all, print, and write down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data_flags = data(folder, VOCABULARY)
    models = {name: train(name, folder, data_flags, args.steps) for name in args.models}
    for name, found in models.items():
        last = {what: list(found[what].values())[-1] for what in ("training loss", "validation loss")}
        print(name, *(f"{what} {value:.4f}" for what, value in last.items()), f"{found['seconds']:.0f} s", sep=", ")
        for what, layers in found.get("entropy of load", {}).items():
            print(f"  entropy of load, {what}:", *(f"layer {n} {value:.4f}" for n, value in layers.items()))
    if args.output:
        settings = {"steps": args.steps, "common flags": " ".join(COMMON)}
        write_result(args.output, **settings, models=models)


if __name__ == "__main__":
    main()
