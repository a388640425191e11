"""Cutting JSON-lines input into files that are tokenized one by one and joined afterwards."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from megatron.training.datasets.json_lines import InputFiles


def partition_paths(input_path: str, num_partitions: int) -> list[Path]:
    """`<stem>_<i><ext>` for each partition; partitions are plain text also where the input is compressed."""
    stem, extension = os.path.splitext(input_path.removesuffix(".gz").replace("*", "").replace("?", ""))
    return [Path(f"{stem}_{i}{extension}") for i in range(num_partitions)]


def write_partitions(files: InputFiles, paths: list[Path], sequential: bool) -> bool:
    """Deal the lines out to `paths` in turn, or with `sequential` in runs of equal length.

    Files that exist already and are newer than the input are used as they are.

    Returns whether the partitions were written.
    """
    if all(path.is_file() and path.stat().st_mtime > files.newest() for path in paths):
        return False
    run_length = -(-_count_lines(files) // len(paths)) if sequential else 1
    partial = [path.with_name(path.name + ".partial") for path in paths]
    try:
        with ExitStack() as stack:
            outputs = [stack.enter_context(open(path, "wb")) for path in partial]
            number = 0
            for block in files.blocks():
                for line in _lines(block.data):
                    outputs[number // max(run_length, 1) % len(paths)].write(line)
                    number += 1
    except BaseException:
        for path in partial:
            path.unlink(missing_ok=True)
        raise
    for source, path in zip(partial, paths):
        os.replace(source, path)
    return True


def _count_lines(files: InputFiles) -> int:
    return sum(block.data.count(b"\n") + (not block.data.endswith(b"\n")) for block in files.blocks())


def _lines(data: bytes) -> list[bytes]:
    """The lines of `data`, each with a newline; bytes.splitlines would also cut at carriage returns."""
    return [line + b"\n" for line in data.removesuffix(b"\n").split(b"\n")]
