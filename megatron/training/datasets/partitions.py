"""Parts of the input that are tokenized one by one and joined afterwards: which lines, in which files."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.training.datasets.input_files import STANDARD_INPUT, InputFiles

PARTIAL = ".partial"


@dataclass(frozen=True)
class InputNames:
    """Names of files made from the input: beside it if it is one file, else beside the output."""

    stem: str
    extension: str
    num_partitions: int

    @classmethod
    def of(cls, inputs: list[str], output_prefix: str, num_partitions: int) -> InputNames:
        """Compression and Parquet are left out of the names: what is made is plain text."""
        if len(inputs) == 1 and inputs[0] != STANDARD_INPUT and os.path.isfile(inputs[0]):
            stem, extension = os.path.splitext(inputs[0].removesuffix(".gz").removesuffix(".zst"))
            return cls(stem, ".jsonl" if extension == ".parquet" else extension, num_partitions)
        return cls(f"{output_prefix}_input", ".jsonl", num_partitions)

    def partition(self, index: int) -> Path:
        """The lines of a partition."""
        return Path(f"{self.stem}_{index}{self.extension}")

    def sentences(self, index: int) -> Path:
        """The lines of a partition, cut into sentences."""
        part = f"_{index}" if self.num_partitions > 1 else ""
        return Path(f"{self.stem}_ss{part}{self.extension}")

    @property
    def record(self) -> Path:
        """How the partitions were made."""
        return Path(f"{self.stem}_partitions.json")


def assign_files(paths: list[str], num_partitions: int, sequential: bool) -> list[list[str]]:
    """Whole files for each partition: in turn, or with `sequential` in runs of about equal size."""
    if not sequential:
        return [paths[i::num_partitions] for i in range(num_partitions)]
    sizes = [os.path.getsize(path) for path in paths]
    total, before = max(sum(sizes), 1), 0
    parts: list[list[str]] = [[] for _ in range(num_partitions)]
    for path, size in zip(paths, sizes):
        parts[min(int((before + size / 2) * num_partitions / total), num_partitions - 1)].append(path)
        before += size
    return parts


def write_partitions(files: InputFiles, names: InputNames, sequential: bool) -> Literal["written", "found"]:
    """Deal the lines out to the partitions in turn, or with `sequential` in runs of equal length.

    Partitions that exist already and are newer than the input are used as they are, unless they were made by other
    rules or for another number of partitions.
    """
    paths = [names.partition(i) for i in range(names.num_partitions)]
    rules = {"partitions": names.num_partitions, "sequential": sequential, "inputs": files.paths}
    if _are_usable(files, paths, names, rules):
        return "found"
    names.record.unlink(missing_ok=True)
    run_length = -(-_count_lines(files) // len(paths)) if sequential else 1
    with ExitStack() as stack:
        outputs = []
        for path in paths:
            partial = path.with_name(path.name + PARTIAL)
            stack.callback(partial.unlink, missing_ok=True)
            outputs.append(stack.enter_context(open(partial, "wb")))
        number = 0
        for block in files.blocks():
            for piece in block.lines():
                outputs[number // max(run_length, 1) % len(paths)].write(piece)
                number += piece.endswith(b"\n")
            files.forget(block)
        for file, path in zip(outputs, paths):
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    write_json(names.record, rules)
    return "written"


def _are_usable(files: InputFiles, paths: list[Path], names: InputNames, rules: dict[str, object]) -> bool:
    newest = files.newest()
    if not all(path.is_file() and path.stat().st_mtime > newest for path in paths):
        return False
    if names.record.exists():
        return read_json(names.record) == rules
    return not names.partition(names.num_partitions).exists()  # made elsewhere: then for exactly so many


def _count_lines(files: InputFiles) -> int:
    count = 0
    for block in files.blocks():
        count += sum(piece.endswith(b"\n") for piece in block.lines())
        files.forget(block)
    return count


def write_json(path: Path, content: object) -> None:
    """A file that is there completely or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> object:
    """The content of such a file; None if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
