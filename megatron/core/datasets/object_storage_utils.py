"""Files of datasets in object storage: `s3://bucket/key` by boto3, `msc://profile/path` by multi-storage-client.

Both packages are optional and imported when the first such path is opened. Where the storage is and who may read it is
said to the packages in their own ways (AWS_ENDPOINT_URL, ~/.aws, MSC_CONFIG, ...).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from megatron.core.datasets.index_cache import built_by_another_process
from megatron.core.msc_utils import MultiStorageClientFeature

S3_PREFIX = "s3://"
MSC_PREFIX = "msc://"
_ATTEMPTS = 5  # of reading a body, on top of what the client tries again by itself


@dataclass
class ObjectStorageConfig:
    """How datasets in object storage are read."""

    path_to_idx_cache: str
    """Local folder for `.idx` files, each fetched once."""

    bin_chunk_nbytes: int = 256 * 1024 * 1024
    """Bytes of a `.bin` file fetched at a time where it is read in order."""

    def __post_init__(self) -> None:
        if self.bin_chunk_nbytes < 1:
            raise ValueError(f"bin_chunk_nbytes must be positive, got {self.bin_chunk_nbytes}")


S3Config = ObjectStorageConfig


@dataclass(frozen=True)
class RemoteFile:
    """A file in object storage as it was found."""

    path: str
    num_bytes: int
    version: str
    """Another one stands for another content."""


class Storage(Protocol):
    """A way to object storage. All raise FileNotFoundError for what is not there, RuntimeError for other failures."""

    def find(self, path: str) -> RemoteFile:
        """The file at `path`."""

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of it."""

    def download(self, file: RemoteFile, target: str) -> None:
        """Write all of it to the local path `target`."""


def is_object_storage_path(path: str) -> bool:
    """Whether `path` lies in object storage."""
    return path.startswith((S3_PREFIX, MSC_PREFIX))


def storage_of(path: str) -> Storage:
    """What reads `path`."""
    return S3Storage() if path.startswith(S3_PREFIX) else MultiStorage()


def get_index_cache_path(idx_path: str, config: ObjectStorageConfig) -> str:
    """The local path of an index file: below the cache folder, its path without the scheme."""
    return os.path.join(config.path_to_idx_cache, idx_path.split("://", 1)[1])


def fetch_index(idx_path: str, config: ObjectStorageConfig) -> str:
    """Local path of a copy of an index file in object storage, fetched unless it is there and still the same.

    Within `run_rank_zero_first` rank 0 fetches and the others wait for the file. It appears under its name only when it
    is complete.
    """
    remote = storage_of(idx_path).find(idx_path)
    local = get_index_cache_path(idx_path, config)
    if _is_copy(local, remote):
        return local
    if built_by_another_process(local, lambda: _is_copy(local, remote) or None):
        return local
    folder = Path(local).parent
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(local) as temporary:
        storage_of(idx_path).download(remote, temporary)
        found = os.path.getsize(temporary)
        if found != remote.num_bytes:
            raise RuntimeError(f"{idx_path} has {remote.num_bytes} bytes, {found} were fetched")
        Path(_note_of(local)).unlink(missing_ok=True)  # until it is written again, the file is nobody's copy
    with _replacing(_note_of(local)) as temporary:
        Path(temporary).write_text(json.dumps(_content_of_note(remote)), encoding="utf-8")
    return local


def _note_of(local: str) -> str:
    """Beside a fetched file: what it is a copy of."""
    return f"{local}.source.json"


def _content_of_note(remote: RemoteFile) -> dict[str, Any]:
    return {"path": remote.path, "bytes": remote.num_bytes, "version": remote.version}


def _is_copy(local: str, remote: RemoteFile) -> bool:
    try:
        note = json.loads(Path(_note_of(local)).read_bytes())
        return note == _content_of_note(remote) and os.path.getsize(local) == remote.num_bytes
    except (OSError, ValueError):
        return False


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    temporary = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


class RemoteTokens:
    """The bytes of a `.bin` file in object storage.

    Two reads in a row from the same block of `chunk_nbytes` fetch the block, extended to the end of what is asked, and
    keep it; a read that jumps into another block fetches just what it asks for. Reading in order thus takes few large
    requests, and reading at random does not fetch 256 MiB for each sample.
    """

    def __init__(self, path: str, chunk_nbytes: int) -> None:
        self._storage = storage_of(path)
        self.file = self._storage.find(path)
        self._chunk_nbytes = chunk_nbytes
        self._last_block = -1
        self._kept: tuple[int, bytes] = (0, b"")

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `position` on."""
        end = position + len(target)
        begin, kept = self._kept
        if not begin <= position <= end <= begin + len(kept):
            block = position // self._chunk_nbytes * self._chunk_nbytes
            goes_on, self._last_block = block == self._last_block, block
            if not goes_on:
                target[:] = self._storage.read(self.file, position, end)
                return
            limit = max(end, min(block + self._chunk_nbytes, self.file.num_bytes))
            begin, kept = self._kept = block, self._storage.read(self.file, block, limit)
        target[:] = memoryview(kept)[position - begin : end - begin]


class S3Storage:
    """`s3://bucket/key` through boto3."""

    def find(self, path: str) -> RemoteFile:
        with _s3_errors(path):
            found = _s3_client(os.getpid()).head_object(**_bucket_and_key(path))
        return RemoteFile(path, int(found["ContentLength"]), found["ETag"])

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

        with _s3_errors(file.path):
            for attempt in range(1, _ATTEMPTS + 1):
                response = _s3_client(os.getpid()).get_object(
                    **_bucket_and_key(file.path), Range=f"bytes={begin}-{end - 1}", IfMatch=file.version
                )
                try:
                    content: bytes = response["Body"].read()
                except (HTTPClientError, IncompleteReadError, ResponseStreamingError):
                    if attempt == _ATTEMPTS:
                        raise
                    continue
                return _of_length(content, file, begin, end)
        raise AssertionError  # the last attempt returned or raised

    def download(self, file: RemoteFile, target: str) -> None:
        with _s3_errors(file.path):
            _s3_client(os.getpid()).download_file(*_bucket_and_key(file.path).values(), target)


def _bucket_and_key(path: str) -> dict[str, str]:
    bucket, _, key = path.removeprefix(S3_PREFIX).partition("/")
    if not bucket or not key:
        raise ValueError(f"{path} is no path in object storage: expected s3://BUCKET/KEY")
    return {"Bucket": bucket, "Key": key}


@cache
def _s3_client(pid: int) -> Any:
    """One for each process: connections do not survive a fork. Threads may share it."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise RuntimeError(f"s3:// paths need the package boto3: pip install boto3 ({error})") from None
    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": _ATTEMPTS}))


@contextmanager
def _s3_errors(path: str) -> Iterator[None]:
    """Names the path in what boto3 raises."""
    _s3_client(os.getpid())  # without boto3 there are no classes of its errors to look for
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
            raise FileNotFoundError(f"no file {path} in object storage ({code})") from None
        if code in ("412", "PreconditionFailed"):
            raise RuntimeError(f"{path} has changed since it was opened: start again") from None
        raise RuntimeError(f"{path} cannot be read from object storage: {error}") from None
    except BotoCoreError as error:
        raise RuntimeError(f"{path} cannot be read from object storage: {error}") from None


class MultiStorage:
    """`msc://profile/path` through multi-storage-client, which says nothing of a file that changes while it is read."""

    def find(self, path: str) -> RemoteFile:
        client, inner = _resolve(path)
        try:
            found = client.info(inner)
        except FileNotFoundError:
            raise FileNotFoundError(f"no file {path} in object storage") from None
        return RemoteFile(path, found.content_length, str(found.etag or found.last_modified))

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        from multistorageclient.types import Range

        client, inner = _resolve(file.path)
        return _of_length(client.read(inner, byte_range=Range(begin, end - begin)), file, begin, end)

    def download(self, file: RemoteFile, target: str) -> None:
        client, inner = _resolve(file.path)
        client.download_file(inner, target)


def _resolve(path: str) -> tuple[Any, str]:
    return MultiStorageClientFeature.import_package().resolve_storage_client(path)


def _of_length(content: bytes, file: RemoteFile, begin: int, end: int) -> bytes:
    if len(content) != end - begin:
        raise RuntimeError(f"{file.path}: bytes {begin} to {end} were asked for, {len(content)} bytes came")
    return content
