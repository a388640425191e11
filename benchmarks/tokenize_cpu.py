"""Preprocessing beside other ways to tokenize the same text, in one run: bytes of text per second of CPU time.

    python benchmarks/tokenize_cpu.py --text corpus.jsonl --vocab-file vocab.json --merge-file merges.txt \
        --bert-vocab-file bert-vocab.txt --nltk-data nltk_data

"preprocess" is the whole program as a process of its own: start, JSON, queues, tokens, writing. The engines alone get
the texts ready-made in memory, without their start. The peers in Python read a share of the documents, spread over all.
CPU time counts all processes, so that other load on the machine disturbs little; wall time is not used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.training.datasets.punkt import read_parameters
from megatron.training.tokenizer.bpe_engines import byte_alphabet
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer, read_merges

PACKAGES = ("tokenizers", "tiktoken", "gigatoken", "nltk", "numpy", "regex")


class PlainBpe:
    """GPT-2's BPE written in Python, with a cache of words."""

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        import regex

        self.vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self.ranks = {pair: rank for rank, pair in enumerate(read_merges(merge_file))}
        self.letters = {byte: letter for letter, byte in byte_alphabet().items()}
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self.words.findall(text):
            if word not in self.known:
                self.known[word] = self._merge([self.letters[byte] for byte in word.encode("utf-8")])
            ids += self.known[word]
        return ids

    def _merge(self, parts: list[str]) -> list[int]:
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == pair
                joined.append("".join(pair) if both else parts[i])
                i += 2 if both else 1
            parts = joined
        return [self.vocab[part] for part in parts]


class PlainWordPiece:
    """BERT's tokens written in Python: fold, split at spaces and punctuation, then the longest pieces first."""

    def __init__(self, vocab_file: str) -> None:
        tokens = Path(vocab_file).read_text(encoding="utf-8").split("\n")
        self.vocab = {token: token_id for token_id, token in enumerate(tokens)}

    def __call__(self, text: str) -> list[int]:
        folded = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in folded if unicodedata.category(c) != "Mn")
        return [token for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain) for token in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        ids, begin = [], 0
        while begin < len(word):
            end = len(word)
            while end > begin and (prefix := "##" * (begin > 0) + word[begin:end]) not in self.vocab:
                end -= 1
            if end == begin:
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[prefix])
            begin = end
        return ids


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def encode_each(tokenizer: GPT2BPETokenizer, texts: list[str]) -> None:
    """One call of the engine for each text."""
    for text in texts:
        tokenizer.tokenize_flat([text])


def program_cpu_seconds(flags: list[str]) -> tuple[float, str]:
    """CPU time of the program with all its processes, and a hash of the token file."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--output-prefix", f"{folder}/out", *flags]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (tokens,) = Path(folder).glob("*.bin")
        digest = hashlib.sha256(tokens.read_bytes()).hexdigest()[:16]
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, digest


def nltk_splitter(folder: str) -> Any:
    """NLTK's own Punkt with its own parameters."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    found = read_parameters(Path(folder) / "tokenizers/punkt_tab/english")
    splitter, parameters = PunktSentenceTokenizer(), PunktParameters()
    parameters.abbrev_types, parameters.collocations = set(found.abbreviations), set(found.collocations)
    parameters.sent_starters = set(found.sentence_starters)
    parameters.ortho_context.update(found.orthography)
    splitter._params = parameters
    return splitter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with real text")
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges.txt")
    parser.add_argument("--bert-vocab-file", required=True, help="BERT's vocab.txt")
    parser.add_argument("--nltk-data", required=True, help="folder with tokenizers/punkt_tab")
    parser.add_argument("--share", type=int, default=20, help="slow peers read every so many-th document")
    parser.add_argument("--rounds", type=int, default=3, help="the best round of the fast ones counts")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tokenize_cpu.json")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "NLTK_DATA": args.nltk_data}

    texts = [json.loads(line)["text"] for line in args.text.open(encoding="utf-8")]
    few = texts[:: args.share]
    size, few_size = (sum(len(text.encode()) for text in chosen) for chosen in (texts, few))
    rows: list[dict[str, Any]] = []

    def add(name: str, num_bytes: int, seconds: float, **more: Any) -> None:
        rows.append({"name": name, "mb_per_cpu_s": round(num_bytes / seconds / 1e6, 2), "bytes": num_bytes, **more})
        print(rows[-1], flush=True)

    files = ["--vocab-file", args.vocab_file, "--merge-file", args.merge_file]
    bpe = ["--input", str(args.text), "--append-eod", "--tokenizer-type", "GPT2BPETokenizer", *files]
    engines = {name: GPT2BPETokenizer(args.vocab_file, args.merge_file, name) for name in ("tiktoken", "gigatoken")}
    reference = GPT2BPETokenizer(args.vocab_file, args.merge_file, "tokenizers")
    for engine in engines.values():
        engine.tokenize_flat(["start"])
    for _ in range(args.rounds):  # what is compared takes turns
        for name, engine in engines.items():
            add(f"{name} alone", size, cpu_seconds(partial(encode_each, engine, texts)))
        for name, workers in (("tiktoken", 1), ("tiktoken", 2), ("gigatoken", 1), ("gigatoken", 2)):
            flags = [*bpe, "--tokenizer-engine", name, "--workers", str(workers)]
            seconds, digest = program_cpu_seconds(flags)
            add(f"preprocess, {name}, {workers} workers", size, seconds, digest=digest)
    plain = PlainBpe(args.vocab_file, args.merge_file)
    add("BPE in Python, cache of words", few_size, cpu_seconds(lambda: [plain(text) for text in few]))
    add("tokenizers encode_batch", few_size, cpu_seconds(lambda: reference._tokenizer.encode_batch(few)))
    word_piece, splitter = PlainWordPiece(args.bert_vocab_file), nltk_splitter(args.nltk_data)
    slow = cpu_seconds(lambda: [word_piece(sentence) for text in few for sentence in splitter.tokenize(text)])
    add("NLTK Punkt, WordPiece in Python", few_size, slow)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "few.jsonl"
        copy.write_text("".join(json.dumps({"text": text}) + "\n" for text in few), encoding="utf-8")
        bert = [
            "--input",
            str(copy),
            "--tokenizer-type",
            "BertWordPieceLowerCase",
            "--vocab-file",
            args.bert_vocab_file,
        ]
        add(
            "preprocess, WordPiece by sentences",
            few_size,
            program_cpu_seconds([*bert, "--workers", "1", "--split-sentences"])[0],
        )

    versions = {name: metadata.version(name) for name in PACKAGES}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    digests = {row["digest"] for row in rows if "digest" in row}
    result = {"machine": machine, "versions": versions, "same_bytes_from_all": len(digests) == 1, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
