"""Data in object storage, read from another project's S3 server and through another project's client.

    python -m venv moto && moto/bin/pip install "moto[s3]" flask flask-cors
    MOTO_SERVER=moto/bin/moto_server bash tests/run.sh -m slow tests/interop/test_object_storage.py

With the package multi-storage-client installed, paths `msc://` are read too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from megatron.core.datasets import object_storage_utils
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig
from tests.unit_tests.datasets.data_files import random_documents, write_dataset

SERVER = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SERVER is None, reason="no moto_server: see this file")]
DOCUMENTS = random_documents(200, seed=8)
IDENTITY = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that holds the documents as s3://corpus/a/text."""
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(SERVER), "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        address = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="w", aws_secret_access_key="w", region_name="us-east-1"
        )
        client.create_bucket(Bucket="corpus")
        local = write_dataset(tmp_path_factory.mktemp("data") / "text", DOCUMENTS)
        for suffix in (".bin", ".idx"):
            client.upload_file(local + suffix, "corpus", f"a/text{suffix}")
        yield address
    finally:
        process.terminate()
        process.wait()


def check(prefix: str, cache: Path) -> None:
    assert IndexedDataset.exists(prefix) and not IndexedDataset.exists(prefix + "-no")
    dataset = IndexedDataset(prefix, object_storage_config=ObjectStorageConfig(str(cache), 256))
    for i in [5, 199, *range(60)]:
        numpy.testing.assert_array_equal(dataset[i], DOCUMENTS[i])
    with pytest.raises(FileNotFoundError, match="in object storage"):
        IndexedDataset(prefix + "-no", object_storage_config=ObjectStorageConfig(str(cache)))


def test_s3(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**IDENTITY, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    object_storage_utils._s3_client.cache_clear()
    check("s3://corpus/a/text", tmp_path / "cache")
    dataset = IndexedDataset("s3://corpus/a/text", object_storage_config=ObjectStorageConfig(str(tmp_path / "cache")))
    changed = write_dataset(tmp_path / "text", DOCUMENTS[::-1])
    client = object_storage_utils._s3_client(os.getpid())
    client.upload_file(f"{changed}.bin", "corpus", "a/text.bin")
    with pytest.raises(RuntimeError, match="has changed since it was opened"):
        dataset[0]
    object_storage_utils._s3_client.cache_clear()


def test_multi_storage_client(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("multistorageclient")
    (tmp_path / "corpus").mkdir()
    local = write_dataset(tmp_path / "corpus" / "text", DOCUMENTS)
    profiles = {"store": {"storage_provider": {"type": "file", "options": {"base_path": str(Path(local).parent)}}}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": profiles}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    check("msc://store/text", tmp_path / "cache")
