"""Files that are what they were meant to be, and checksums that notice when they are not."""

import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.durable import Checksum, checksum_of_file, write_durably
from megatron.core.dist_checkpointing.durable.checksum import BLOCK
from megatron.core.dist_checkpointing.durable.file import BUFFER_BYTES, durable_file
from megatron.core.dist_checkpointing.manifest import (
    damaged_files,
    read_manifest,
    share_of_files,
    write_manifest,
)
from tests.worker_pool import run_ranks

SIZES = [0, 1, 4095, 4096, BLOCK, BLOCK + 1, BUFFER_BYTES, BUFFER_BYTES + 4097, 2 * BUFFER_BYTES + 5]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_holds_its_segments(tmp_path: Path, size: int) -> None:
    content = noise(size)
    cuts = sorted(random.Random(size).choices(range(size + 1), k=3))
    segments = [content[a:b] for a, b in zip([0, *cuts], [*cuts, size])]
    record = write_durably(tmp_path / "file", segments)
    assert (tmp_path / "file").read_bytes() == content
    assert record.size == size and record.checksum == checksum_of_file(tmp_path / "file")


def digest(content: bytes) -> str:
    checksum = Checksum()
    checksum.update(content)
    return checksum.hexdigest()


def test_the_checksum_is_its_published_definition() -> None:
    import hashlib

    content = noise(BLOCK + 100)
    sums = hashlib.sha256()
    for block in (content[:BLOCK], content[BLOCK:] + bytes(BLOCK - 100)):
        words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, BLOCK, 8)]
        columns = [sum(words[c::512]) % 2**64 for c in range(512)]
        rows = [sum(words[r * 512 : (r + 1) * 512]) % 2**64 for r in range(256)]
        for total in (*columns, *rows):
            sums.update(total.to_bytes(8, "little"))
    sums.update(len(content).to_bytes(8, "little"))
    assert digest(content) == sums.hexdigest()


def test_changes_change_the_checksum() -> None:
    chance = random.Random(1)
    content = bytearray(noise(2 * BLOCK + 999))
    original = digest(content)
    for _ in range(50):
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        assert digest(changed) != original
    pieces = [(0, 8), (0, 4096), (0, BLOCK)]
    for start, size in pieces:  # two words, two rows, two blocks change places
        changed = bytearray(content)
        changed[start : start + size], changed[start + size : start + 2 * size] = (
            content[start + size : start + 2 * size],
            content[start : start + size],
        )
        assert digest(changed) != original
    assert digest(content + b"\0") != original
    assert digest(content[:-1]) != original
    assert digest(bytes(5)) != digest(bytes(6))


def fill_a_limited_file(path: str) -> list[str]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    for size in (100_000, BUFFER_BYTES + 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5000, limits[1]))
        try:
            write_durably(path, [bytes(size)])
        except OSError as error:
            messages.append(f"{error.strerror} {error.filename}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return messages


def test_what_does_not_fit_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert run_ranks(1, fill_a_limited_file, str(path)) == [[f"File too large {path}"] * 2]


def test_the_reason_of_a_failed_write_survives_writers_that_hide_it() -> None:
    with pytest.raises(OSError, match="No space left"), durable_file("/dev/full") as (file, _):
        try:
            file.write(bytes(BUFFER_BYTES))
        except OSError as error:
            raise RuntimeError("something failed") from error


# ---- the manifest ----


def make_files(directory: Path) -> None:
    records = {}
    for name, size in (("a", 100), ("b", BLOCK + 3), ("sub/c", 5)):
        (directory / name).parent.mkdir(exist_ok=True)
        records[name] = write_durably(directory / name, [noise(size, size)])
    write_manifest(directory, records)


def test_a_manifest_finds_what_is_damaged(tmp_path: Path) -> None:
    make_files(tmp_path)
    records = read_manifest(tmp_path)
    assert records is not None
    seen: list[int] = []
    assert damaged_files(tmp_path, records, on_progress=seen.append) == []
    assert sum(seen) == sum(record.size for record in records.values())
    with open(tmp_path / "b", "r+b") as file:
        file.seek(BLOCK)
        byte = file.read(1)
        file.seek(BLOCK)
        file.write(bytes([byte[0] ^ 1]))
    os.truncate(tmp_path / "a", 99)
    (tmp_path / "sub" / "c").unlink()
    problems = damaged_files(tmp_path, records)
    assert [problem.removeprefix(str(tmp_path)) for problem in problems] == [
        "/a has 99 bytes, 100 were written",
        "/b is damaged: its checksum is not the one of what was written",
        "/sub/c is missing",
    ]
    assert len(damaged_files(tmp_path, records, checksums=False)) == 2
    assert damaged_files(tmp_path, records, ["b"]) == problems[1:2]


def test_manifests_that_are_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    for content in ["", "[]", "{}", '{"version": 1, "algorithm": "rowcol64-sha256", "files": {"a": {}}}']:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointingException, match="is damaged"):
            read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 9, "algorithm": "md5", "files": {}}')
    with pytest.raises(CheckpointingException, match="version 9"):
        read_manifest(tmp_path)
    for name in ("/etc/passwd", "../x"):
        write_manifest(tmp_path, {name: write_durably(tmp_path / "x", [b""])})
        with pytest.raises(CheckpointingException, match="outside of the checkpoint"):
            read_manifest(tmp_path)


def test_ranks_share_the_files_evenly(tmp_path: Path) -> None:
    records = {f"f{i}": write_durably(tmp_path / "x", [bytes(i * 10)]) for i in range(20)}
    shares = [share_of_files(records, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(records)
    loads = [sum(records[name].size for name in share) for share in shares]
    assert max(loads) - min(loads) <= 190
