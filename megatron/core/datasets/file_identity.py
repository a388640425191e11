"""Whether a file is still the one that something was made from: its size and a hash of its content."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from typing import Any

_CHUNK = 1 << 20


def identify(path: str) -> dict[str, Any]:
    """Size, modification time and BLAKE2 hash of a file, as values for JSON."""
    status = os.stat(path)
    digest = _digest(path, status.st_size, status.st_mtime_ns)
    return {
        "file": os.path.basename(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "blake2b": digest,
    }


def difference(path: str, identity: dict[str, Any]) -> str | None:
    """How a file differs from the one that was identified, None if it does not.

    The content is read only where the modification time differs, as it does for a copy on another disk.
    """
    status = os.stat(path)
    if status.st_size != identity["bytes"]:
        return f"{path} has {status.st_size} bytes, it had {identity['bytes']}"
    if status.st_mtime_ns == identity["mtime_ns"]:
        return None
    if _digest(path, status.st_size, status.st_mtime_ns) == identity["blake2b"]:
        return None
    return f"{path} has another content"


@lru_cache(maxsize=4096)
def _digest(path: str, num_bytes: int, mtime_ns: int) -> str:
    """Hash of the content; size and time stand for the content in the table of known hashes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
