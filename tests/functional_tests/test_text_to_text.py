"""The way of the quickstart, at the smallest size: text, vocabulary, token files, training on four ranks that
stops and resumes, text again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.program import ROOT, pretrain_gpt, run_program, train_rows
from tests.worker_pool import run_ranks

PROMPTS = ["The whale", "It is a"]
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2 --micro-batch-size 2 --global-batch-size 8
    --lr 1e-2 --train-iters 8 --save-interval 4 --eval-interval 4 --eval-iters 1 --log-interval 1
    --num-workers 0
"""


def run(*command: object, threads: int = 1) -> str:
    """Run a command line from the repository root; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Part of the corpus, a vocabulary learned from it, and its token files."""
    folder = tmp_path_factory.mktemp("text")
    run(sys.executable, "examples/data/corpus_to_jsonl.py", folder / "whole.jsonl")
    documents = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    part = [{"text": document["text"][:3000]} for document in documents[:40]]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))
    corpus = folder / "corpus.jsonl"
    run(sys.executable, "tools/train_bpe.py", "--input", corpus, "--vocab-size", 500, "--output-dir", folder)
    run(
        *(
            sys.executable,
            "tools/preprocess_data.py",
            "--input",
            corpus,
            "--output-prefix",
            folder / "corpus",
        ),
        *(*tokenizer_flags(folder), "--append-eod", "--workers", 2),
    )
    return folder


def tokenizer_flags(folder: Path) -> list[str]:
    return [
        *("--tokenizer-type", "GPT2BPETokenizer"),
        *("--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")),
    ]


def training_flags(folder: Path) -> list[str]:
    data = ["--data-path", str(folder / "corpus_text_document"), "--split", "80,15,5"]
    places = ["--save", str(folder / "checkpoints"), "--load", str(folder / "checkpoints")]
    return [*MODEL.split(), *LAYOUT.split(), *tokenizer_flags(folder), *data, *places]


def written_texts(printed: str) -> str:
    """What generate_text.py prints after its preparations."""
    _, found, texts = printed.rpartition("at iteration 8\n")
    assert found
    assert all(prompt in texts for prompt in PROMPTS)
    return texts


def test_text_in_text_out(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run(*torchrun, "pretrain_gpt.py", *training_flags(folder), "--exit-interval", 4)
    assert "exiting program at iteration 4" in printed
    resumed = pretrain_gpt(4, training_flags(folder), tiny=False)
    assert "at iteration 4" in resumed[0]
    assert "validation loss at iteration 8" in resumed[-1]
    losses = [row["lm loss"] for row in train_rows(folder / "checkpoints/metrics.jsonl")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3

    flags = [
        *("--load", str(folder / "checkpoints"), "--use-checkpoint-args", *tokenizer_flags(folder)),
        *("--prompts", *PROMPTS, "--num-tokens-to-generate", "8", "--top_k", "20", "--seed", "3"),
    ]
    alone = written_texts(run(sys.executable, "tools/generate_text.py", *flags))
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    spread = run_ranks(4, run_program, "tools/generate_text.py", [*flags, *layout])
    assert written_texts(spread[0]) == alone
