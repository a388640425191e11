"""Peak memory of preprocessing: a large file of lines, and one very long line.

    python benchmarks/preprocess_memory.py --text corpus.jsonl --vocab-file vocab.json --merge-file merges.txt \
        --file-bytes 5e9 --line-bytes 2e8

The lines of the corpus are repeated up to the sizes asked for. Memory is that of all processes together, sampled twenty
times a second: proportional set size, in which pages shared by several processes count once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_file(corpus: Path, path: Path, num_bytes: int) -> None:
    """The corpus' lines, over and over."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    with open(path, "wb") as file:
        for line in itertools.cycle(lines):
            if file.write(line) and file.tell() >= num_bytes:
                return


def write_line(corpus: Path, path: Path, num_bytes: int) -> None:
    """One document: the corpus' texts, over and over, in a single line."""
    texts = [json.dumps(json.loads(line)["text"])[1:-1].encode() for line in corpus.open("rb")]
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        for text in itertools.cycle(texts):
            if file.write(text + b"\\n") and file.tell() >= num_bytes:
                break
        file.write(b'"}\n')


def processes_of(parent: int) -> list[int]:
    """A process and its descendants."""
    found = [parent]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def proportional_set_size(pid: int) -> int:
    """Bytes; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(command: list[str]) -> dict[str, float]:
    """Peak of all processes together while a command runs."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, sum(map(proportional_set_size, processes_of(running.pid))))
            time.sleep(0.05)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}")
    return {"peak_mib": round(peak / 2**20), "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with real text")
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges.txt")
    parser.add_argument("--file-bytes", type=float, default=5e9, help="size of the file of lines")
    parser.add_argument("--line-bytes", type=float, default=2e8, help="size of the long line")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes to try")
    parser.add_argument("--engines", nargs="+", default=["auto"], help="values of --tokenizer-engine to try")
    parser.add_argument("--folder", type=Path, default=None, help="where the large files go for a while")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/preprocess_memory.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind, write, size in (("line", write_line, args.line_bytes), ("file", write_file, args.file_bytes)):
            path = Path(folder) / f"{kind}.jsonl"
            write(args.text, path, int(size))
            for engine, workers in itertools.product(args.engines, args.workers):
                command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
                command += ["--output-prefix", f"{folder}/out", "--workers", str(workers), "--append-eod"]
                command += ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", args.vocab_file]
                command += ["--merge-file", args.merge_file, "--tokenizer-engine", engine]
                row = {"input": kind, "bytes": path.stat().st_size, "engine": engine, "workers": workers}
                rows.append(row | measure(command))
                print(rows[-1], flush=True)
            path.unlink()
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
