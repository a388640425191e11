"""Speed and memory of what stands between token files and a training step, on one CPU.

    python benchmarks/data_cpu.py [--only NAME ...] [--output benchmarks/results/data_cpu.json]

sample_index: the index of 10 M documents with 1 G tokens, beside a C loop compiled here; masked_sample_index: that of
BERT and T5, likewise; blend: 10 M samples of 32 datasets; cold_start: a fresh process that opens 1000 prefixes with
warm caches, up to its first batch, imports included; loader: tokens that GPTDataset gives through the data loader out
of the page cache; training: the share of a training step that waits for data. Times are CPU seconds of the measuring
process unless a name says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy
import torch

from benchmarks.harness import versions, write_result
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_blending_indices, build_sample_index
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.masked_sample_index import SentenceGrouping, build_masked_sample_index
from megatron.core.datasets.mersenne_twister import mt19937_64
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.tokenizer.null_tokenizer import NullTokenizer

C_LOOP = """
#include <stdint.h>
int64_t walk(const int32_t *lengths, const int32_t *documents, int64_t num_documents, int64_t sequence_length,
             int64_t num_samples, int32_t *index) {
    int64_t place = 0, offset = 0;
    index[0] = index[1] = 0;
    for (int64_t sample = 1; sample <= num_samples; ++sample) {
        int64_t need = sequence_length + 1;
        for (;;) {
            int64_t available = lengths[documents[place]] - offset;
            if (available >= need) { offset += need - 1; break; }
            if (place == num_documents - 1) { offset = lengths[documents[place]] - 1; break; }
            need -= available; ++place; offset = 0;
        }
        index[2 * sample] = (int32_t)place;
        index[2 * sample + 1] = (int32_t)offset;
    }
    return place;
}
"""


C_MASKED_LOOP = """
#include <stdint.h>
int64_t cut(const int64_t *starts, int64_t num_documents, const int32_t *lengths, int64_t num_samples, int32_t full,
            int32_t ratio, int32_t minimum, const uint32_t *draws, const uint64_t *picks, uint32_t *index) {
    int64_t row = 0, drawn = 0;
    while (row < num_samples) {
        for (int64_t d = 0; d < num_documents; ++d) {
            int64_t begin = starts[d], end = starts[d + 1], first = begin, length = 0, is_long = 0;
            if (end - begin < minimum) continue;
            for (int64_t i = begin; i < end; ++i) is_long |= lengths[i] > 512;
            if (is_long && end - begin > 1) continue;
            uint32_t draw = draws[drawn++], target = draw % ratio ? full : 2 + draw % (full - 1);
            for (int64_t i = begin; i < end; ++i) {
                length += lengths[i];
                if ((length >= target && i < end - 2 && i + 1 - first >= minimum) || i == end - 1) {
                    index[3 * row] = first; index[3 * row + 1] = i + 1; index[3 * row++ + 2] = target;
                    first = i + 1; length = 0; draw = draws[drawn++];
                    target = draw % ratio ? full : 2 + draw % (full - 1);
                }
            }
        }
    }
    for (int64_t i = row - 1, k = 0; i > 0; --i, ++k) {
        int64_t j = picks[k] % (i + 1);
        for (int c = 0; c < 3; ++c) {
            uint32_t kept = index[3 * i + c]; index[3 * i + c] = index[3 * j + c]; index[3 * j + c] = kept;
        }
    }
    return row;
}
"""


def cpu_seconds(work: Callable[[], Any], rounds: int = 3) -> tuple[float, Any]:
    """(best of some rounds, the result)."""
    best, result = float("inf"), None
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def compiled(folder: Path, source: str, name: str) -> Any:
    """A function in C, None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    (folder / f"{name}.c").write_text(source)
    library = folder / f"{name}.so"
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library, folder / f"{name}.c"], check=True)
    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = ctypes.c_int64
    return function


def pointer_to(array: numpy.ndarray | None) -> Any:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def sample_index(folder: Path) -> dict[str, Any]:
    """10 M documents, 1 G tokens."""
    rng = numpy.random.default_rng(0)
    lengths = rng.integers(1, 200, 10_000_000, dtype=numpy.int32)
    documents = rng.permutation(len(lengths)).astype(numpy.int32)
    num_tokens, walk, result = int(lengths.sum(dtype=numpy.int64)), compiled(folder, C_LOOP, "walk"), {}
    for sequence_length in (1024, 4096):
        num_samples = (num_tokens - 1) // sequence_length

        def ours(q: int = sequence_length, n: int = num_samples) -> numpy.ndarray:
            return build_sample_index(lengths, documents, q, n)

        seconds, index = cpu_seconds(ours)
        tracemalloc.start()
        ours()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row = {"seconds": seconds, "result_bytes": index.nbytes, "peak_over_result": peak / index.nbytes}
        if walk is not None:
            expected = numpy.empty_like(index)
            pointers = [pointer_to(array) for array in (lengths, documents, expected)]
            sizes = [ctypes.c_int64(n) for n in (len(documents), sequence_length, num_samples)]
            row["c_seconds"], _ = cpu_seconds(lambda p=pointers, s=sizes: walk(p[0], p[1], *s, p[2]))
            assert numpy.array_equal(index, expected)
            row["times_c"] = seconds / row["c_seconds"]
        result[f"sequence_length_{sequence_length}"] = row
    return {"documents": len(documents), "tokens": num_tokens, **result}


def masked_sample_index(folder: Path) -> dict[str, Any]:
    """BERT's and T5's: 200 000 documents of 20 sentences of 25 tokens on average; C gets its random numbers ready."""
    rng = numpy.random.default_rng(2)
    counts = rng.integers(1, 40, 200_000)
    starts = numpy.concatenate([[0], numpy.cumsum(counts)])
    lengths = rng.integers(1, 50, int(starts[-1]), dtype=numpy.int32)
    grouping = SentenceGrouping(509, 0.1, 2, 1234)
    seconds, index = cpu_seconds(lambda: build_masked_sample_index(starts, lengths, 1, grouping), rounds=2)
    result = {"documents": len(counts), "sentences": len(lengths), "samples": len(index), "seconds": seconds}
    cut = compiled(folder, C_MASKED_LOOP, "cut")
    if cut is None:
        return result
    draws = numpy.random.RandomState(1234).randint(0, 1 << 32, size=2 * len(lengths), dtype=numpy.uint32)
    picks, expected = mt19937_64(1235, len(index)), numpy.empty_like(index)
    sizes = [ctypes.c_int64(len(counts)), ctypes.c_int64(1), ctypes.c_int32(509), ctypes.c_int32(10), ctypes.c_int32(2)]

    def in_c() -> int:
        arrays = [pointer_to(array) for array in (starts, lengths, draws, picks, expected)]
        return cut(arrays[0], sizes[0], arrays[1], *sizes[1:], *arrays[2:])

    c_seconds, rows = cpu_seconds(in_c)
    assert rows == len(index) and numpy.array_equal(index, expected)
    return result | {"c_seconds": c_seconds, "times_c": seconds / c_seconds}


def blend(folder: Path) -> dict[str, Any]:
    """10 M samples of 32 datasets."""
    weights = numpy.random.default_rng(1).dirichlet(numpy.ones(32))
    seconds, _ = cpu_seconds(lambda: build_blending_indices(weights, 10_000_000), rounds=1)
    return {"samples": 10_000_000, "datasets": 32, "seconds": seconds}


def write_tokens(prefix: Path, num_documents: int, mean_length: int, seed: int) -> str:
    """A dataset of random tokens in uint16; returns its prefix."""
    rng = numpy.random.default_rng(seed)
    lengths = rng.integers(1, 2 * mean_length, num_documents, dtype=numpy.int32)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", numpy.uint16)
    tokens = rng.integers(0, 50000, int(lengths.sum()), dtype=numpy.uint16)
    builder.add_documents(tokens, lengths, numpy.ones(num_documents, numpy.int64))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def config_of(blend_: Any, sequence_length: int, cache: Path, threads: int = 1) -> GPTDatasetConfig:
    """Settings as pretrain_gpt.py makes them."""
    return GPTDatasetConfig(
        random_seed=1234,
        sequence_length=sequence_length,
        blend=blend_,
        split="98,1,1",
        path_to_cache=str(cache),
        num_dataset_builder_threads=threads,
        tokenizer=NullTokenizer(50000),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def loader_of(dataset: Any, micro_batch_size: int) -> Any:
    """As training reads: one rank, no worker processes."""
    return build_pretraining_data_loader(
        dataset, 0, micro_batch_size=micro_batch_size, data_parallel_rank=0, data_parallel_size=1
    )


def first_batch(folder: Path, num_prefixes: int) -> float:
    """Seconds from nothing open to the first batch."""
    start = time.perf_counter()
    prefixes = [str(folder / f"part{i}") for i in range(num_prefixes)]
    config = config_of((prefixes, [1.0 + i % 7 for i in range(num_prefixes)]), 256, folder / "cache")
    datasets = BlendedMegatronDatasetBuilder(GPTDataset, [100_000, 1000, 1000], lambda: True, config).build()
    next(iter(loader_of(datasets[0], 4)))
    return time.perf_counter() - start


COLD_START = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.data_cpu import first_batch
imported = time.process_time()
print(imported, first_batch(Path({folder!r}), {num_prefixes}), time.process_time())
"""


def cold_start(folder: Path) -> dict[str, Any]:
    """1000 prefixes, from the start of Python to the first batch; the round that fills the caches is left out."""
    num_prefixes = 1000
    for i in range(num_prefixes):
        write_tokens(folder / f"part{i}", 2000, 100, i)
    code = COLD_START.format(root=str(ROOT), folder=str(folder), num_prefixes=num_prefixes)
    rounds = []
    for _ in range(6):
        start = time.perf_counter()
        found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
        wall = time.perf_counter() - start
        rounds.append([wall, *(float(word) for word in found.stdout.split()[-3:])])
    columns = list(zip(*rounds[1:]))
    names = ("wall_seconds", "cpu_seconds_of_imports", "wall_seconds_without_imports", "cpu_seconds")
    medians = {name: statistics.median(column) for name, column in zip(names, columns)}
    return {"prefixes": num_prefixes, "rounds": len(rounds) - 1, **medians, "least_wall_seconds": min(columns[0])}


def loader(folder: Path) -> dict[str, Any]:
    """Tokens per CPU-second of batches of 4 samples; documents of 1000 tokens on average."""
    prefixes = [write_tokens(folder / name, 20_000, 1000, seed) for seed, name in enumerate("xy")]
    result = {}
    for sequence_length in (1024, 4096):
        config = config_of((prefixes[:1], None), sequence_length, folder / "loader-cache")
        blended = config_of((prefixes, [1.0, 2.0]), sequence_length, folder / "loader-cache")
        for name, one in (("one", config), ("blend", blended)):
            dataset = BlendedMegatronDatasetBuilder(GPTDataset, [2000, 0, 0], lambda: True, one).build()[0]

            def read(dataset: Any = dataset) -> int:
                batches = zip(range(500), loader_of(dataset, 4))
                return sum(batch["tokens"].numel() for _, batch in batches)

            read()
            seconds, num_tokens = cpu_seconds(read)
            result[f"{name}_sequence_length_{sequence_length}"] = {"tokens_per_cpu_second": num_tokens / seconds}
    return result


FLAGS = """
    --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 512 --max-position-embeddings 512
    --micro-batch-size 4 --global-batch-size 4 --lr 1e-4 --train-iters 12 --eval-iters 0 --split 100,0,0
    --tokenizer-type NullTokenizer --vocab-size 50000 --num-workers 0 --timing-log-level 2 --log-interval 10
    --timing-log-option max --no-progress-bar
""".split()


def training(folder: Path) -> dict[str, Any]:
    """The timers of pretrain_gpt.py: batch-generator beside the iteration."""
    prefix = write_tokens(folder / "t", 5000, 1000, 9)
    command = [sys.executable, "pretrain_gpt.py", *FLAGS, "--data-path", prefix]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    waited = float(re.findall(r"batch-generator[ .]*: *([\d.]+)", printed)[-1])
    step = float(re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", printed)[-1])
    return {"batch_generator_ms": waited, "iteration_ms": step, "share": waited / step}


MEASUREMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sample_index": sample_index,
    "masked_sample_index": masked_sample_index,
    "blend": blend,
    "cold_start": cold_start,
    "loader": loader,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file, beside those that stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text())["results"]
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results[name] = MEASUREMENTS[name](Path(folder)) | {"load": os.getloadavg()[0]}
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.output:
            write_result(args.output, versions=versions("numpy"), results=results)


if __name__ == "__main__":
    main()
