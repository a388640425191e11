"""The content of files before they are written: pieces of bytes and tensors, one after the other.

Because a file is planned to the last byte, the table of contents is known before anything is written, and whoever
writes needs to know nothing: the same plan is written at once from the tensors' own memory, or copied into a buffer
and written by another process while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..collective import together
from ..durable import FileRecord, write_durably
from .catalog import Entry, Written

Segment = bytes | torch.Tensor


@dataclass
class FilePlan:
    """A file: its name, its bytes, and which entries of the checkpoint lie where in it."""

    name: str
    segments: list[Segment] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return sum(segment_size(segment) for segment in self.segments)


def segment_size(segment: Segment) -> int:
    """Number of bytes."""
    return len(segment) if isinstance(segment, bytes) else segment.numel() * segment.element_size()


def segment_bytes(segment: Segment) -> Any:
    """The bytes of a segment, as a buffer; a tensor on the CPU is not copied if it is contiguous."""
    if isinstance(segment, bytes):
        return segment
    flat = segment.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def plan_files(
    entries: list[Entry],
    rank: int,
    num_files: int,
    make_file: Callable[[str, list[Entry]], FilePlan],
    suffix: str,
    separation_hint: str | None = None,
) -> list[FilePlan]:
    """At most `num_files` files of about the same size that hold the entries of a rank.

    Entries whose name starts with `separation_hint` get files of their own, whose names start so too.
    """
    groups = {"": [e for e in entries if not _separate(e, separation_hint)]}
    if separation_hint is not None:
        groups[separation_hint] = [e for e in entries if _separate(e, separation_hint)]
    return [
        make_file(f"{prefix}__{rank}_{n}{suffix}", part)
        for prefix, group in groups.items()
        for n, part in enumerate(_even_parts(group, num_files))
    ]


def _separate(entry: Entry, separation_hint: str | None) -> bool:
    return separation_hint is not None and entry.key.startswith(separation_hint)


def _even_parts(entries: list[Entry], count: int) -> list[list[Entry]]:
    """At most `count` parts of about the same number of bytes, none of them empty."""
    parts: list[list[Entry]] = [[] for _ in range(count)]
    sizes = [0] * count
    for entry in sorted(entries, key=lambda e: e.num_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(entry)
        sizes[smallest] += entry.num_bytes + 1
    return [part for part in parts if part]


def write_plans(plans: Iterable[FilePlan], directory: Path) -> dict[str, FileRecord]:
    """Write files side by side; they are on the disk on return. The result says what they must be to be whole."""
    plans = list(plans)
    with ThreadPoolExecutor(max(1, len(plans))) as pool:
        jobs = [pool.submit(write_durably, directory / plan.name, _buffers(plan)) for plan in plans]
        return {plan.name: job.result() for plan, job in zip(plans, jobs)}


def _buffers(plan: FilePlan) -> Iterator[Any]:
    return (segment_bytes(segment) for segment in plan.segments)


def write_together(make_plans: Callable[[], list[FilePlan]], directory: Path) -> dict[str, FileRecord]:
    """Plan and write the files of this rank. All ranks call this; if one fails, all raise."""
    records: dict[str, FileRecord] = {}
    with together(f"cannot write {directory}"):
        records = write_plans(make_plans(), directory)
    return records
