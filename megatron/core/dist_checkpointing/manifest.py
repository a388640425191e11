"""The list of a checkpoint's files with their sizes and checksums, written after all of them: a checkpoint that agrees
with its manifest is the one that was saved, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .core import CheckpointingException
from .durable import ALGORITHM, FileRecord, checksum_of_file
from .durable.file import replace_durably

MANIFEST_FNAME = "manifest.json"
_VERSION = 1
_READERS = 4


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest: whole or not at all."""
    files = {name: {"size": record.size, "checksum": record.checksum} for name, record in sorted(records.items())}
    content = {"version": _VERSION, "algorithm": ALGORITHM, "files": files}
    replace_durably(directory / MANIFEST_FNAME, json.dumps(content, indent=1).encode())


def read_manifest(directory: Path) -> dict[str, FileRecord] | None:
    """File name -> what it must be; None if the checkpoint has no manifest (other programs write none).

    Raises:
        CheckpointingException: the manifest is damaged.
    """
    path = directory / MANIFEST_FNAME
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION or content["algorithm"] != ALGORITHM:
            raise CheckpointingException(
                f"{path} has version {content['version']!r} and checksums {content['algorithm']!r}, this program knows "
                f"version {_VERSION} and {ALGORITHM}"
            )
        files = {name: FileRecord(int(row["size"]), str(row["checksum"])) for name, row in content["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointingException(f"{path} is damaged ({type(error).__name__}: {error})") from error
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointingException(f"{path} names files outside of the checkpoint: {', '.join(outside[:3])}")
    return files


def damaged_files(
    directory: Path,
    records: Mapping[str, FileRecord],
    names: Iterable[str] | None = None,
    checksums: bool = True,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """What is wrong with the files of a manifest, one line a file.

    Args:
        names: check only these (default: all); ranks share the work by names.
        checksums: read the files; otherwise only their sizes are compared.
        on_progress: told the size of each file once it is checked.
    """

    def check(name: str) -> str | None:
        problem = _damage(directory / name, records[name], checksums)
        on_progress(records[name].size)
        return problem

    with ThreadPoolExecutor(_READERS) as pool:
        return [problem for problem in pool.map(check, records if names is None else names) if problem is not None]


def _damage(path: Path, record: FileRecord, checksums: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path} has {size} bytes, {record.size} were written"
        if checksums and checksum_of_file(path) != record.checksum:
            return f"{path} is damaged: its checksum is not the one of what was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def share_of_files(records: Mapping[str, FileRecord], rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks checks, so that all have about as many bytes to read."""
    loads = [0] * size
    own = []
    for name in sorted(records, key=lambda n: (-records[n].size, n)):
        least = loads.index(min(loads))
        loads[least] += records[name].size + 1
        if least == rank:
            own.append(name)
    return own
