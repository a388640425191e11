"""How well retrieval learns on real text: WordNet's entries as blocks, their words as titles, from text to index.

    apt-get download dict-wn && dpkg-deb -x dict-wn_*.deb wordnet
    python benchmarks/retrieval_wordnet.py --dictionary wordnet/usr/share/dictd --work /tmp/wordnet

runs tools/preprocess_data.py, pretrain_bert.py, pretrain_ict.py and tools/create_doc_index.py as a user would, and asks
for each block of the held-out entries with one of its sentences. The entries that queries are taken from were never
trained on; the index has the blocks of all entries. `whole` looks the block up as the index has it, with the query in
it; `cloze` puts the block without the query in its place, the harder task that training poses. `start` is the BERT that
`ict` begins with, `bm25` counts words.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy
import tokenizers
import torch

from benchmarks.harness import machine

LENGTH, WIDTH, VOCAB, HELD_OUT = 64, 128, 8192, 0.1
MODEL = (
    f"--num-layers 2 --hidden-size {WIDTH} --num-attention-heads 2 --seq-length {LENGTH} --bert-no-binary-head "
    f"--max-position-embeddings {LENGTH} --position-embedding-type rope --tokenizer-type BertWordPieceLowerCase "
    f"--hidden-dropout 0 --attention-dropout 0 --num-workers 0"
)
RETRIEVER = f"--ict-head-size {WIDTH}"
SPLIT = f"--split {100 - 100 * HELD_OUT:.0f},{100 * HELD_OUT:.0f},0"
KS = (1, 5, 20)
Places = dict[str, list[int]]
"""`whole` and `cloze` -> for each query, how many blocks score higher than the right one."""


# --- the text -------------------------------------------------------------------------------------


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


def write_corpus(dictionary: Path, work: Path) -> int:
    """Write `corpus.jsonl` and `vocab.txt`; the number of entries."""
    found = sorted(entries(dictionary), key=lambda entry: hash_of(entry[0]))
    with (work / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"title": word, "text": text}) + "\n" for word, text in found)
    engine = tokenizers.BertWordPieceTokenizer(lowercase=True)
    engine.train_from_iterator((f"{word} {text}" for word, text in found), vocab_size=VOCAB, show_progress=False)
    engine.save_model(str(work))
    return len(found)


def hash_of(word: str) -> int:
    """An order of words that has nothing to do with the alphabet, always the same."""
    return int.from_bytes(word.encode(), "little") * 2654435761 % 2**32


# --- training and index, by the programs ----------------------------------------------------------


def run(work: Path, program: str, flags: str) -> float:
    """Run a program of this repository; seconds of CPU time that it took."""
    with (work / "log.txt").open("a") as log:
        log.write(f"$ {program} {flags}\n")
        log.flush()
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, str(ROOT / program), *flags.split()], check=True, stdout=log, stderr=log)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(end.ru_utime - begin.ru_utime + end.ru_stime - begin.ru_stime, 1)


def train(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """From the text to two indices; CPU-seconds of each program."""
    vocabulary, data = f"--vocab-file {work}/vocab.txt", f"--data-path {work}/wn_text_sentence"
    titles = f"--titles-data-path {work}/wn_title_sentence"
    training = f"{MODEL} {vocabulary} {data} {SPLIT} --eval-iters 4 --log-interval 50 --lr-warmup-fraction 0.05"
    retriever = (
        f"{training} {titles} {RETRIEVER} --bert-load {work}/bert --micro-batch-size 64 "
        f"--query-in-block-prob 0.1 --retriever-report-topk-accuracies 1 5 {args.ict_flags}"
    )
    ict = f"--lr {args.lr} --train-iters {args.ict_steps} --metrics-jsonl {work}/ict.jsonl"
    steps = {
        "preprocess": (
            "tools/preprocess_data.py",
            f"--input {work}/corpus.jsonl --json-keys text title --split-sentences --workers 1 "
            f"--output-prefix {work}/wn --tokenizer-type BertWordPieceLowerCase {vocabulary}",
        ),
        "bert": (
            "pretrain_bert.py",
            f"{training} --train-iters {args.bert_steps} --micro-batch-size 64 --lr 2e-3 {saving(work, 'bert')}",
        ),
        "start": (
            "pretrain_ict.py",
            f"{retriever} --lr 1e-30 --train-iters 1 {args.ict_flags} {saving(work, 'start')}",
        ),
        "ict": ("pretrain_ict.py", f"{retriever} {ict} {saving(work, 'ict')}"),
    }
    for name in ("start", "ict"):
        index = f"--ict-load {work}/{name} --block-data-path {work}/{name}.pkl"
        steps[f"index {name}"] = (
            "tools/create_doc_index.py",
            f"{MODEL} {vocabulary} {data} {titles} {RETRIEVER} {shared(args)} {index}",
        )
    return {name: run(work, program, flags) for name, (program, flags) in steps.items()}


def saving(work: Path, name: str) -> str:
    return f"--save {work}/{name} --save-interval 100000"


def shared(args: argparse.Namespace) -> str:
    """The flags of `--ict-flags` that say what the model is."""
    return " ".join(word for word in args.ict_flags.split() if word == "--biencoder-shared-query-context-model")


# --- measuring ------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, work: Path, names: Sequence[str]) -> dict[str, Any]:
    """Accuracies of the retrievers saved under these names, and of counting words, for the same queries."""
    from megatron.training import get_args, get_model, initialize_megatron
    from megatron.training.checkpointing import load_biencoder_checkpoint
    from megatron.training.retrieval.block_data import BlockData
    from megatron.training.retrieval.passages import Blocks
    from pretrain_ict import dataset_config, model_provider
    from tools.create_doc_index import only_dataset

    sys.argv = (
        f"x {MODEL} --vocab-file {work}/vocab.txt --data-path {work}/wn_text_sentence {RETRIEVER} --split 1,0,0 "
        f"--titles-data-path {work}/wn_title_sentence --micro-batch-size 1 --no-load-optim --no-load-rng {shared(args)}"
    ).split()
    initialize_megatron(args_defaults={"model_family": "retrieval"})
    blocks = Blocks(only_dataset(replace(dataset_config(get_args().seq_length), query_in_block_probability=0.0)))
    first = len(blocks.dataset.indices) * (1 - HELD_OUT)
    held_out = [place for place, row in enumerate(blocks.rows) if row[2] >= first]  # column 2: the document
    samples = [blocks.dataset.sample(blocks.rows[place], seed=place) for place in held_out]
    found = {
        "blocks": len(blocks.ids),
        "queries": len(held_out),
        "chance": {f"top{k}": k / len(blocks.ids) for k in KS},
    }
    found["bm25"] = shares(places_by_words(blocks, held_out, samples))
    for name in names:
        model = get_model(model_provider, wrap_with_ddp=False)
        load_biencoder_checkpoint(model, custom_load_path=str(work / name))
        vectors = BlockData.load(work / f"{name}.pkl").embed_data
        found[name] = shares(places_by_model(model[0].eval(), vectors, held_out, samples))
    return found


def shares(places: Places) -> dict[str, dict[str, float]]:
    return {
        kind: {f"top{k}": round(sum(place < k for place in found) / len(found), 4) for k in KS}
        for kind, found in places.items()
    }


@torch.no_grad()
def places_by_model(
    model: Any, vectors: dict[int, numpy.ndarray], held_out: Sequence[int], samples: Sequence[dict[str, Any]]
) -> Places:
    """By inner products with the vectors of the index; what `FaissMIPSIndex` finds first is what is first here."""
    from megatron.core.extensions.mips_index import FaissMIPSIndex

    index, table = FaissMIPSIndex(WIDTH, vectors), torch.from_numpy(numpy.stack([*vectors.values()])).float()
    higher: Places = {"whole": [], "cloze": []}
    keys = ("query_tokens", "query_pad_mask", "context_tokens", "context_pad_mask")
    for begin in range(0, len(held_out), 128):
        part = held_out[begin : begin + 128]
        batch = samples[begin : begin + 128]
        queries, without = model(*(torch.from_numpy(numpy.stack([sample[key] for sample in batch])) for key in keys))
        scores = queries @ table.T
        own, cloze = scores[torch.arange(len(part)), part], (queries * without).sum(1)
        higher["whole"] += (scores > own[:, None]).sum(1).tolist()
        higher["cloze"] += ((scores > cloze[:, None]).sum(1) - (own > cloze).long()).tolist()
        _, ids = index.search_mips_index(queries, 1, reconstruct=False)
        assert all((row[0] == i) <= (place == 0) for row, i, place in zip(ids, part, higher["whole"][-len(part) :]))
    return higher


def places_by_words(blocks: Any, held_out: Sequence[int], samples: Sequence[dict[str, Any]]) -> Places:
    """By BM25 (Robertson & Zaragoza 2009, section 3.2; k1 1.2, b 0.75) on the tokens that the model reads."""
    texts = [real(*blocks.tokens(place)) for place in range(len(blocks.ids))]
    mean = sum(map(len, texts)) / len(texts)
    containing = Counter(token for text in texts for token in set(text))

    def weights(text: Sequence[int]) -> dict[int, float]:
        norm = 1.2 * (0.25 + 0.75 * len(text) / mean)
        return {token: count * 2.2 / (count + norm) for token, count in Counter(text).items()}

    postings: dict[int, tuple[list[int], list[float]]] = {}
    for place, text in enumerate(texts):
        for token, weight in weights(text).items():
            rows, values = postings.setdefault(token, ([], []))
            rows.append(place), values.append(weight)
    columns = {token: (numpy.array(rows), numpy.array(values)) for token, (rows, values) in postings.items()}
    rarity = {token: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for token, n in containing.items()}
    higher: Places = {"whole": [], "cloze": []}
    for place, sample in zip(held_out, samples):
        query = set(real(sample["query_tokens"], sample["query_pad_mask"])) & columns.keys()
        scores = numpy.zeros(len(texts))
        for token in query:
            rows, values = columns[token]
            scores[rows] += values * rarity[token]
        without = weights(real(sample["context_tokens"], sample["context_pad_mask"]))
        cloze = sum(without[token] * rarity[token] for token in query & without.keys())
        higher["whole"].append(int((scores > scores[place]).sum()))
        higher["cloze"].append(int((scores > cloze).sum() - (scores[place] > cloze)))
    return higher


def real(tokens: numpy.ndarray, mask: numpy.ndarray) -> list[int]:
    return tokens[mask == 1].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionary", type=Path, required=True, help="folder with wn.dict.dz")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything in between")
    parser.add_argument("--bert-steps", type=int, default=200)
    parser.add_argument("--ict-steps", type=int, default=1000)
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--ict-flags", default="", help="further flags of pretrain_ict.py")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    if not (args.dictionary / "wn.dict.dz").is_file():
        parser.error(f"--dictionary {args.dictionary} has no wn.dict.dz: see the top of {__file__}")
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("bert_steps", "ict_steps", "lr", "ict_flags")}
    found: dict[str, Any] = {"machine": machine(), "settings": settings}
    found["entries"] = write_corpus(args.dictionary, args.work)
    found["cpu_seconds"] = train(args, args.work)
    found |= evaluate(args, args.work, ("start", "ict"))
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
