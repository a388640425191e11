"""Running the preprocessing program in this process, and reading what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools.preprocess_data import parse_args, run

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def run_tool(inputs: str | list[str], prefix: Path | str, *flags: str) -> None:
    paths = [inputs] if isinstance(inputs, str) else inputs
    run(parse_args(["--input", *paths, "--output-prefix", str(prefix), "--workers", "1", *NULL, *flags]))


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def documents(prefix: Path | str) -> list[list[list[int]]]:
    dataset = IndexedDataset(str(prefix))
    ends = dataset.document_indices.tolist()
    return [[sequence.tolist() for sequence in dataset[begin:end]] for begin, end in zip(ends, ends[1:])]


def files_of(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
