"""Pretrain a small BERT or T5 on the English text of this repository, from its raw text to the learning curve.

    python benchmarks/pretrain_real_text.py bert --output benchmarks/results/pretrain_real_text_bert.json
    python benchmarks/pretrain_real_text.py t5 --output benchmarks/results/pretrain_real_text_t5.json

runs what anyone would: examples/data/corpus_to_jsonl.py, tools/train_wordpiece.py, tools/preprocess_data.py
--split-sentences, then pretrain_bert.py or pretrain_t5.py on one process (some minutes of one core). The documents are
the paragraphs of a novel and 71 speeches, in random order, the last tenth of them the validation set.

What the curve is compared with is the loss of a model that knows how frequent each token is among those to be said, and
nothing of their context: the entropy of the labels of the validation samples. The order of sentences is compared with
ln 2, which a coin gets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy

from benchmarks.harness import machine
from megatron.training.datasets.run_data import load_run_data
from tools.unigram_entropy import entropy

VOCAB = 2000
SHORTEST = 200
"""Characters of a document: shorter paragraphs have no two sentences."""
COMMON = """
    --hidden-size 128 --num-attention-heads 4 --init-method-std 0.05 --attention-dropout 0 --hidden-dropout 0.1
    --lr 2e-3 --min-lr 1e-4 --lr-warmup-iters 60 --lr-decay-style linear --weight-decay 0.01 --adam-beta2 0.98
    --split 90,10,0 --num-workers 0 --log-interval 50 --no-progress-bar --cross-entropy-loss-fusion
""".split()
FLAGS = {
    "bert": """
        --num-layers 2 --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
        --micro-batch-size 32 --global-batch-size 32 --train-iters 1000 --eval-interval 100 --eval-iters 20
    """.split(),
    "t5": """
        --encoder-num-layers 2 --decoder-num-layers 2 --encoder-seq-length 64 --decoder-seq-length 32
        --max-position-embeddings 64 --position-embedding-type relative --vocab-extra-ids 30
        --micro-batch-size 64 --global-batch-size 64 --train-iters 400 --eval-interval 50 --eval-iters 10
    """.split(),
}
"""Of a model that one core trains in minutes."""
LOSSES = ("lm loss", "sop loss")


def run(program: str, *words: str) -> None:
    """A program of this repository, its output shown."""
    print(f"+ python {program} {' '.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(ROOT / program), *words], check=True, env=environment)


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """The parts of a corpus between empty lines: paragraphs of the novel, and speeches, each of which is one line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        for text in json.loads(line)["text"].split("\n\n"):
            if len(text) >= SHORTEST:
                yield {"text": " ".join(text.split())}


def own_corpus(folder: Path) -> Path:
    """The text of this repository, a document a line, made in `folder`."""
    chapters, corpus = folder / "chapters.jsonl", folder / "corpus.jsonl"
    run("examples/data/corpus_to_jsonl.py", str(chapters))
    documents = list(paragraphs(chapters))
    random.Random(1).shuffle(documents)
    corpus.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return corpus


def prepare(folder: Path, corpus: Path) -> list[str]:
    """The flags that name data and vocabulary, made in `folder`."""
    vocab = folder / "vocab.txt"
    run(
        "tools/train_wordpiece.py",
        *("--input", str(corpus), "--vocab-size", str(VOCAB), "--lower-case", "--output", str(vocab)),
    )
    tokenizer = ["--vocab-file", str(vocab), "--tokenizer-type", "BertWordPieceLowerCase"]
    words = ["--input", str(corpus), "--output-prefix", str(folder / "corpus"), "--split-sentences", "--workers", "1"]
    run("tools/preprocess_data.py", *words, *tokenizer)
    return [*tokenizer, "--data-path", str(folder / "corpus_text_sentence"), "--data-cache-path", str(folder / "cache")]


def entropy_of_labels(model: str, flags: list[str]) -> float:
    """Nats per token that a validation sample asks for."""
    samples = load_run_data(str(ROOT / f"pretrain_{model}.py"), flags).datasets["valid"]
    everything = (samples[i] for i in range(len(samples)))
    labels = numpy.concatenate([sample["labels"][sample["loss_mask"] == 1] for sample in everything])
    return entropy(numpy.bincount(labels))


def curves(path: Path, every: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the metrics file: means of the training losses over `every` iterations, and validation losses."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row for row in rows if "lm loss" in row]
    training = []
    for last in range(every, len(steps) + 1, every):
        part = steps[last - every : last]
        means = {name: float(numpy.mean([row[name] for row in part])) for name in LOSSES if name in part[0]}
        training.append({"iteration": part[-1]["iteration"], **means})
    validation = [
        {"iteration": row["iteration"]} | {name: row[key] for name in LOSSES if (key := f"{name} validation") in row}
        for row in rows
        if "lm loss validation" in row
    ]
    return {"training": training, "validation": validation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FLAGS)
    parser.add_argument("--corpus", type=Path, help="other text: a JSON object with a `text` for each document")
    parser.add_argument("--output", type=Path, help="write settings and curves to this JSON file")
    parser.add_argument("--folder", type=Path, help="keep data, vocabulary and metrics here")
    own, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = own.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*COMMON, *FLAGS[own.model], *more]
        data = prepare(folder, own.corpus or own_corpus(folder))
        metrics = folder / f"{own.model}.jsonl"
        metrics.unlink(missing_ok=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(f"pretrain_{own.model}.py", *flags, *data, "--metrics-jsonl", str(metrics))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {
            "settings": {"flags": " ".join(flags), "vocabulary": VOCAB},
            "machine": machine(),
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
            "entropy_of_labels": entropy_of_labels(own.model, [*flags, *data]),
            "coin": math.log(2),
            **curves(metrics, 50),
        }
    last = found["validation"][-1]
    print(f"\nentropy of the labels {found['entropy_of_labels']:.4f}, ln 2 {math.log(2):.4f}")
    print(f"last validation: {last}")
    if own.output:
        own.output.parent.mkdir(parents=True, exist_ok=True)
        own.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
