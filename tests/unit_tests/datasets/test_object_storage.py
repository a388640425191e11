from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from megatron.core.datasets import object_storage_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig, RemoteTokens, get_index_cache_path
from megatron.core.msc_utils import MultiStorageClientFeature
from tests.unit_tests.datasets.data_files import gpt_config, random_documents, write_dataset
from tests.unit_tests.datasets.s3_server import S3Server, s3_server
from tests.worker_pool import run_ranks

PREFIX = "s3://corpus/a/b/text"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    pytest.importorskip("boto3")
    with s3_server() as running:
        environment = {"AWS_ENDPOINT_URL": running.url, "AWS_DEFAULT_REGION": "us-east-1"}
        environment |= {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        object_storage_utils._s3_client.cache_clear()
        yield running
        object_storage_utils._s3_client.cache_clear()


def upload(server: S3Server, local: str, remote: str = PREFIX) -> None:
    for suffix in (".bin", ".idx"):
        server.objects[remote.removeprefix("s3://") + suffix] = Path(local + suffix).read_bytes()


def open_remote(cache: Path, chunk: int = 1 << 28) -> IndexedDataset:
    return IndexedDataset(PREFIX, object_storage_config=ObjectStorageConfig(str(cache), chunk))


def gets(server: S3Server, suffix: str) -> list[str]:
    """Ranges of the requests for a body."""
    return [wanted for method, path, wanted in server.requests if method == "GET" and path.endswith(suffix)]


@pytest.mark.parametrize("chunk", [64, 1 << 28])
def test_sequences_are_those_of_the_local_files(server: S3Server, tmp_path: Path, chunk: int) -> None:
    documents = random_documents(30, seed=3)
    local = write_dataset(tmp_path / "text", documents)
    upload(server, local)
    dataset, expected = open_remote(tmp_path / "cache", chunk), IndexedDataset(local)
    assert IndexedDataset.exists(PREFIX) and not IndexedDataset.exists(PREFIX + "x")
    for i in (7, 3, 4, 5, 29, 0):
        numpy.testing.assert_array_equal(dataset[i], documents[i])
        numpy.testing.assert_array_equal(dataset.get(i, 1), documents[i][1:])
    assert dataset.get(2, 0, 0).size == 0
    for found, document in zip(dataset[4:20], expected[4:20], strict=True):
        numpy.testing.assert_array_equal(found, document)
    numpy.testing.assert_array_equal(copy.deepcopy(dataset)[9], documents[9])


def test_tokens_come_in_blocks_where_they_are_read_in_order(server: S3Server, tmp_path: Path) -> None:
    server.objects["corpus/x.bin"] = content = bytes(range(250)) * 4
    tokens = RemoteTokens("s3://corpus/x.bin", 100)

    def read(begin: int, end: int) -> None:
        target = bytearray(end - begin)
        tokens.read_into(begin, memoryview(target))
        assert target == content[begin:end]

    def ranges() -> list[str]:
        found = gets(server, "x.bin")
        server.requests.clear()
        return found

    read(510, 520)
    read(120, 140)
    assert ranges() == ["bytes=510-519", "bytes=120-139"]  # jumps: just what is asked
    read(140, 150)
    assert ranges() == ["bytes=100-199"]  # goes on: the block
    read(100, 200)
    read(150, 160)
    assert ranges() == []  # at hand
    read(190, 230)
    assert ranges() == ["bytes=100-229"]  # extended to what is asked
    read(990, 1000)
    read(900, 1000)
    assert ranges() == ["bytes=990-999", "bytes=900-999"]  # not beyond the end


def test_an_index_is_fetched_once_and_again_when_it_changes(server: S3Server, tmp_path: Path) -> None:
    cache, config = tmp_path / "cache", ObjectStorageConfig(str(tmp_path / "cache"))
    upload(server, write_dataset(tmp_path / "one", random_documents(9, seed=1)))
    assert open_remote(cache).local_prefix == str(cache / "corpus/a/b/text")
    assert get_index_cache_path(PREFIX + ".idx", config) == str(cache / "corpus/a/b/text.idx")
    open_remote(cache)
    assert len(gets(server, ".idx")) == 1
    other = random_documents(9, seed=2)
    upload(server, write_dataset(tmp_path / "two", other))
    numpy.testing.assert_array_equal(open_remote(cache)[5], other[5])
    assert len(gets(server, ".idx")) == 2
    Path(cache / "corpus/a/b/text.idx").write_bytes(b"half of it")  # of a process that was killed, or another's
    numpy.testing.assert_array_equal(open_remote(cache)[5], other[5])
    assert not list(cache.rglob("*.partial"))


def test_what_goes_wrong_is_named(server: S3Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"no file s3://corpus/a/b/text\.bin in object storage"):
        open_remote(cache)
    with pytest.raises(ValueError, match="--object-storage-cache-path"):
        IndexedDataset(PREFIX)
    with pytest.raises(ValueError, match="expected s3://BUCKET/KEY"):
        IndexedDataset.exists("s3:///text")
    upload(server, write_dataset(tmp_path / "text", random_documents(9)))
    whole = server.objects["corpus/a/b/text.bin"]
    server.objects["corpus/a/b/text.bin"] = whole[:-2]
    with pytest.raises(ValueError, match=r"s3://corpus/a/b/text\.bin is truncated"):
        open_remote(cache)
    server.objects["corpus/a/b/text.bin"] = whole
    dataset = open_remote(cache)
    server.cut_bodies = 2
    assert dataset[0][-1] == 99  # read again
    server.objects["corpus/a/b/text.bin"] = whole[::-1]
    with pytest.raises(RuntimeError, match="has changed since it was opened"):
        dataset.get(8)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    object_storage_utils._s3_client.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(RuntimeError, match="pip install boto3"):
        open_remote(tmp_path)
    monkeypatch.setitem(sys.modules, "multistorageclient", None)
    config = ObjectStorageConfig(str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install multi-storage-client"):
        IndexedDataset("msc://profile/text", object_storage_config=config)
    MultiStorageClientFeature.disable()
    try:
        assert not MultiStorageClientFeature.is_enabled()
        with pytest.raises(RuntimeError, match="--disable-msc"):
            IndexedDataset("msc://profile/text", object_storage_config=config)
    finally:
        MultiStorageClientFeature.enable()


def test_samples_are_those_of_the_local_files_through_the_loader(server: S3Server, tmp_path: Path) -> None:
    local = write_dataset(tmp_path / "text", random_documents(80))
    upload(server, local)

    def samples(prefix: str) -> torch.Tensor:
        config = gpt_config(blend=([prefix], None), split="1,0,0", object_storage_cache_path=str(tmp_path / "cache"))
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, config).build()[0]
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=2)  # processes of their own
        return torch.cat([batch["tokens"] for batch in loader])

    assert torch.equal(samples(PREFIX), samples(local))
    folders = [path.relative_to(tmp_path) for path in tmp_path.rglob("GPTDataset_indices")]
    assert sorted(map(str, folders)) == [
        "cache/corpus/a/b/text/cache/GPTDataset_indices",
        "text/cache/GPTDataset_indices",
    ]


def open_on_rank(environment: dict[str, str], cache: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        object_storage_utils._s3_client.cache_clear()
        config = gpt_config(blend=([PREFIX], None), split="1,0,0", object_storage_cache_path=cache)
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, config).build()[0]
        return int(sum(dataset[i]["tokens"].sum() for i in range(40)))


def test_one_rank_fetches_the_index_for_all(server: S3Server, tmp_path: Path) -> None:
    upload(server, write_dataset(tmp_path / "text", random_documents(80)))
    environment = {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret"}
    sums = run_ranks(2, open_on_rank, environment, str(tmp_path / "cache"))
    assert len(set(sums)) == 1
    assert len(gets(server, ".idx")) == 1
