"""How well retrieval learns on real text: WordNet's entries as blocks, their words as titles, from text to index.

    apt-get download dict-wn && dpkg-deb -x dict-wn_*.deb wordnet
    python benchmarks/retrieval_wordnet.py --dictionary wordnet/usr/share/dictd --work /tmp/wordnet

runs tools/preprocess_data.py, pretrain_bert.py, pretrain_ict.py and tools/create_doc_index.py as a user would, and asks
for each held-out entry with one of its sentences. The entries that queries are taken from were never trained on; the
index has all entries. `whole` looks the block up as the index has it, with the query in it; `cloze` replaces it by the
block without the query, the harder task that training poses. `start` is the BERT that `ict` begins with.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy
import tokenizers
import torch

LENGTH, VOCAB, HELD_OUT = 64, 8192, 0.1
MODEL = (
    f"--num-layers 2 --hidden-size 128 --num-attention-heads 2 --seq-length {LENGTH} "
    f"--max-position-embeddings {LENGTH} --tokenizer-type BertWordPieceLowerCase --num-workers 0"
)
RETRIEVER = "--ict-head-size 128"
SPLIT = f"--split {100 - 100 * HELD_OUT:.0f},{100 * HELD_OUT:.0f},0"
KS = (1, 5, 20)


def entries(dictionary: Path) -> Iterator[tuple[str, str]]:
    """(word, its meanings as sentences) of the entries with at least three meanings."""
    with gzip.open(dictionary / "wn.dict.dz", "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    for entry in re.split(r"\n(?=\S)", text):
        word, _, body = entry.partition("\n")
        meanings = re.split(r"\s(?:\w+ )?\d+: ", " " + " ".join(body.split()))[1:]
        cleaned = [re.sub(r"[{}]", "", meaning).strip(" .") for meaning in meanings]
        if len(cleaned) >= 3:
            yield word, " ".join(f"{meaning[0].upper()}{meaning[1:]}." for meaning in cleaned if meaning)


def write_corpus(dictionary: Path, work: Path, most: int | None) -> int:
    """Write `corpus.jsonl` and `vocab.txt`; the number of entries."""
    found = sorted(entries(dictionary), key=lambda entry: hash_of(entry[0]))[:most]
    with (work / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"title": word, "text": text}) + "\n" for word, text in found)
    engine = tokenizers.BertWordPieceTokenizer(lowercase=True)
    engine.train_from_iterator((f"{word} {text}" for word, text in found), vocab_size=VOCAB, show_progress=False)
    engine.save_model(str(work))
    return len(found)


def hash_of(word: str) -> int:
    """An order of words that has nothing to do with the alphabet, always the same."""
    return int.from_bytes(word.encode(), "little") * 2654435761 % 2**32


def run(work: Path, program: str, flags: str) -> float:
    """Run a program of this repository; seconds that it took."""
    begin = time.time()
    with (work / "log.txt").open("a") as log:
        log.write(f"$ {program} {flags}\n")
        log.flush()
        subprocess.run([sys.executable, str(ROOT / program), *flags.split()], check=True, stdout=log, stderr=log)
    return time.time() - begin


def train(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """From the text to an index; seconds of each program."""
    vocabulary, data = f"--vocab-file {work}/vocab.txt", f"--data-path {work}/wn_text_sentence"
    titles = f"--titles-data-path {work}/wn_title_sentence"
    training = f"{MODEL} {vocabulary} {data} {SPLIT} --eval-iters 4 --log-interval 50 --lr-warmup-fraction 0.05"
    bert, ict = (f"--save {work}/{name} --save-interval 100000" for name in ("bert", "ict"))
    seconds = {
        "preprocess": run(
            work,
            "tools/preprocess_data.py",
            f"--input {work}/corpus.jsonl --json-keys text title --split-sentences --workers 1 "
            f"--output-prefix {work}/wn --tokenizer-type BertWordPieceLowerCase {vocabulary}",
        ),
        "bert": run(
            work,
            "pretrain_bert.py",
            f"{training} {bert} --train-iters {args.bert_steps} --micro-batch-size 64 --lr 1e-3",
        ),
    }
    retriever = (
        f"{training} {titles} {RETRIEVER} --bert-load {work}/bert --retriever-score-scaling --micro-batch-size 64"
    )
    retriever += f" {ict} --retriever-report-topk-accuracies 1 5 --metrics-jsonl {work}/ict.jsonl --lr 5e-4"
    seconds["ict"] = run(work, "pretrain_ict.py", f"{retriever} --train-iters {args.ict_steps}")
    run(work, "pretrain_ict.py", f"{retriever} --train-iters 1 --lr 1e-30".replace("/ict ", "/start "))
    for name in ("start", "ict"):
        seconds[f"index {name}"] = run(
            work,
            "tools/create_doc_index.py",
            f"{MODEL} {vocabulary} {data} {titles} {RETRIEVER} --ict-load {work}/{name} "
            f"--block-data-path {work}/{name}.pkl",
        )
    return seconds


def ranks(work: Path, name: str) -> dict[str, Any]:
    """How many blocks score higher than the right one, for each held-out block."""
    from megatron.core.extensions.mips_index import FaissMIPSIndex
    from megatron.training import get_args, get_model, initialize_megatron
    from megatron.training.checkpointing import load_biencoder_checkpoint
    from megatron.training.retrieval.block_data import BlockData
    from megatron.training.retrieval.passages import Blocks
    from pretrain_ict import dataset_config, model_provider
    from tools.create_doc_index import only_dataset

    sys.argv = (
        f"x {MODEL} --vocab-file {work}/vocab.txt --data-path {work}/wn_text_sentence {RETRIEVER} --split 1,0,0 "
        f"--titles-data-path {work}/wn_title_sentence --micro-batch-size 1 --ict-load {work}/{name} "
        "--no-load-optim --no-load-rng"
    ).split()
    initialize_megatron(args_defaults={"model_family": "retrieval"})
    model = get_model(model_provider, wrap_with_ddp=False)
    load_biencoder_checkpoint(model, custom_load_path=get_args().ict_load)
    model[0].eval()
    config = replace(dataset_config(LENGTH), query_in_block_probability=0.0)
    blocks = Blocks(only_dataset(config))
    vectors = BlockData.load(work / f"{name}.pkl").embed_data
    index = FaissMIPSIndex(128, vectors)
    documents = len(blocks.dataset.indices)
    held_out = [i for i, row in enumerate(blocks.rows) if row[2] >= documents * (1 - HELD_OUT)]
    table = torch.from_numpy(numpy.stack([vectors[i] for i in blocks.ids])).float()
    higher: dict[str, list[int]] = {"whole": [], "cloze": []}
    with torch.no_grad():
        for begin in range(0, len(held_out), 128):
            part = held_out[begin : begin + 128]
            samples = [blocks.dataset.sample(blocks.rows[i], seed=i) for i in part]
            columns = [
                torch.from_numpy(numpy.stack([sample[key] for sample in samples]))
                for key in ("query_tokens", "query_pad_mask", "context_tokens", "context_pad_mask")
            ]
            queries, without = model[0](*columns)
            scores = queries @ table.T
            own = scores[torch.arange(len(part)), part]
            higher["whole"] += (scores > own[:, None]).sum(1).tolist()
            cloze = (queries * without).sum(1)
            higher["cloze"] += ((scores > cloze[:, None]).sum(1) - (own > cloze).long()).tolist()
            _, ids = index.search_mips_index(queries, 1, reconstruct=False)  # the index finds the same
            assert all((row[0] == i) <= (place == 0) for row, i, place in zip(ids, part, higher["whole"][-len(part) :]))
    shares = {
        kind: {f"top{k}": sum(place < k for place in places) / len(places) for k in KS}
        for kind, places in higher.items()
    }
    return {"blocks": len(blocks.ids), "queries": len(held_out), **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionary", type=Path, required=True, help="folder with wn.dict.dz")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything in between")
    parser.add_argument("--entries", type=int, help="only so many")
    parser.add_argument("--bert-steps", type=int, default=200)
    parser.add_argument("--ict-steps", type=int, default=400)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--evaluate", metavar="NAME", help="only measure this model, and print the result")
    args = parser.parse_args()
    if args.evaluate:
        print("RESULT " + json.dumps(ranks(args.work, args.evaluate)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"entries": write_corpus(args.dictionary, args.work, args.entries)}
    found |= {"bert_steps": args.bert_steps, "ict_steps": args.ict_steps, "seconds": train(args, args.work)}
    words = [sys.executable, __file__, "--dictionary", str(args.dictionary), "--work", str(args.work), "--evaluate"]
    for name in ("start", "ict"):
        said = subprocess.run([*words, name], check=True, capture_output=True, text=True, env=os.environ).stdout
        found[name] = json.loads(re.search(r"^RESULT (.*)$", said, re.MULTILINE)[1])  # type: ignore[index]
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
