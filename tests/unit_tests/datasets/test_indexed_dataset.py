import copy
import multiprocessing
import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

SEQUENCES = [[1, 2, 3], [], [4], [5, 6, 7, 8], [9]]
DOCUMENTS = [0, 2, 2, 4, 5]
FORK = multiprocessing.get_context("fork")  # starts at once: torch is imported already


def write_example(prefix: Path, dtype: type[numpy.number] = numpy.uint16, multimodal: bool = False) -> str:
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype, multimodal)
    for i, sequence in enumerate(SEQUENCES):
        builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode=i % 2)
        for _ in range(DOCUMENTS.count(i + 1)):
            builder.end_document()
    builder.finalize(get_idx_path(str(prefix)))
    return str(prefix)


def test_files_are_byte_for_byte_the_format(tmp_path: Path) -> None:
    prefix = write_example(tmp_path / "d")
    tokens = [token for sequence in SEQUENCES for token in sequence]
    assert Path(prefix + ".bin").read_bytes() == struct.pack("<9H", *tokens)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 5, 5)
    expected += struct.pack("<5i", 3, 0, 1, 4, 1) + struct.pack("<5q", 0, 6, 6, 8, 16)
    expected += struct.pack("<5q", *DOCUMENTS)
    assert Path(prefix + ".idx").read_bytes() == expected


def test_multimodal_files_end_with_a_byte_for_each_sequence(tmp_path: Path) -> None:
    plain = Path(write_example(tmp_path / "p") + ".idx").read_bytes()
    modes = Path(write_example(tmp_path / "m", multimodal=True) + ".idx").read_bytes()
    assert modes == plain + bytes([0, 1, 0, 1, 0])


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [getattr(numpy, member.name) for member in DType])
def test_reads_what_was_written(tmp_path: Path, mmap: bool, dtype: type[numpy.number]) -> None:
    dataset = IndexedDataset(write_example(tmp_path / "d", dtype), mmap=mmap)
    assert len(dataset) == 5
    for i, sequence in enumerate(SEQUENCES):
        assert dataset[i].dtype == dtype
        assert dataset[i].tolist() == sequence
    assert [part.tolist() for part in dataset[1:4]] == SEQUENCES[1:4]
    assert dataset[2:2] == []
    assert dataset[-1].tolist() == [9]
    assert dataset.get(3, offset=1, length=2).tolist() == [6, 7]
    assert dataset.get(3, offset=2).tolist() == [7, 8]
    assert dataset.get(0, offset=3).tolist() == []
    assert dataset.sequence_lengths.tolist() == [3, 0, 1, 4, 1]
    assert dataset.document_indices.tolist() == DOCUMENTS
    assert dataset.sequence_modes is None
    again = copy.deepcopy(dataset)
    assert again.mmap == mmap and again[3].tolist() == SEQUENCES[3]


@pytest.mark.parametrize("mmap", [True, False])
def test_modes(tmp_path: Path, mmap: bool) -> None:
    dataset = IndexedDataset(write_example(tmp_path / "d", multimodal=True), multimodal=True, mmap=mmap)
    tokens, mode = dataset[3]
    assert tokens.tolist() == SEQUENCES[3] and mode == 1
    sequences, modes = dataset[0:3]
    assert [part.tolist() for part in sequences] == SEQUENCES[:3] and modes.tolist() == [0, 1, 0]
    assert copy.deepcopy(dataset)[1][1] == 1


def test_reads_beyond_a_sequence_are_refused(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_example(tmp_path / "d"))
    with pytest.raises(ValueError, match="tokens 2 to 4 asked of sequence 0, which has 3"):
        dataset.get(0, 2, 2)
    with pytest.raises(ValueError, match="step 1"):
        dataset[0:4:2]
    with pytest.raises(IndexError):
        dataset[5]


def test_empty_dataset(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"))
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(str(tmp_path / "d"))
    assert len(dataset) == 0 and dataset.document_indices.tolist() == [0] and dataset[:] == []


@pytest.mark.parametrize("multimodal", [True, False])
def test_add_index_appends_documents(tmp_path: Path, multimodal: bool) -> None:
    prefix = write_example(tmp_path / "part", multimodal=multimodal)
    builder = IndexedDatasetBuilder(str(tmp_path / "all.bin"), numpy.uint16, multimodal)
    builder.add_index(prefix)
    builder.add_index(prefix)
    builder.finalize(str(tmp_path / "all.idx"))
    dataset = IndexedDataset(str(tmp_path / "all"), multimodal)
    sequences = dataset[:][0] if multimodal else dataset[:]
    assert [sequence.tolist() for sequence in sequences] == SEQUENCES * 2
    assert dataset.document_indices.tolist() == [0, 2, 2, 4, 5, 7, 7, 9, 10]


def test_add_index_of_another_type_is_refused(tmp_path: Path) -> None:
    prefix = write_example(tmp_path / "part")
    builder = IndexedDatasetBuilder(str(tmp_path / "all.bin"), numpy.int32)
    with pytest.raises(ValueError, match="stores uint16, it cannot be appended .* stores int32"):
        builder.add_index(prefix)
    builder.abort()


def test_add_document_writes_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), numpy.int32)
    builder.add_document(torch.arange(6), [2, 0, 4])
    builder.add_document(torch.arange(0), [])
    builder.add_documents(numpy.arange(3), [1, 2], [0, 2])
    with pytest.raises(ValueError, match="do not fit together"):
        builder.add_document(torch.arange(6), [2, 3])
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(str(tmp_path / "d"))
    assert [part.tolist() for part in dataset[:]] == [[0, 1], [], [2, 3, 4, 5], [0], [1, 2]]
    assert dataset.document_indices.tolist() == [0, 3, 3, 3, 5]


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, token: int) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), numpy.uint16)
    with pytest.raises(ValueError, match="do not fit into uint16"), builder:
        builder.add_item(torch.tensor([1, token]))
    assert list(tmp_path.iterdir()) == []


def test_dtype_codes() -> None:
    assert [DType.size(member.value) for member in DType] == [1, 1, 2, 4, 8, 8, 4, 2]
    assert DType.optimal_dtype(65499) is numpy.uint16
    assert DType.optimal_dtype(65500) is numpy.int32
    assert DType.optimal_dtype(None) is numpy.int32
    with pytest.raises(ValueError, match="float16 cannot be stored"):
        DType.code_from_dtype(numpy.float16)


# -- damaged and foreign files -------------------------------------------------------------------------


def put(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


def damaged_indices() -> dict[str, tuple[int | None, bytes | int, str]]:
    """Name -> (position of new bytes, or None to truncate; bytes or length; what the error says)."""
    cases: dict[str, tuple[int | None, bytes | int, str]] = {
        f"magic byte {i}": (i, b"?", "is not an index file") for i in range(9)
    }
    cases |= {f"cut to {n} bytes": (None, n, "truncated|not an index file") for n in range(0, 133, 4)}
    cases |= {f"version {n}": (9, struct.pack("<Q", n), "format version") for n in (0, 2, 2**60)}
    cases |= {f"dtype code {n}": (17, bytes([n]), "unknown dtype code") for n in (0, 9, 255)}
    sizes = "truncated|another format|mode for each"
    cases |= {f"{n} sequences": (18, struct.pack("<Q", n), sizes) for n in (0, 4, 6, 10, 2**40, 2**63)}
    cases |= {f"{n} documents": (26, struct.pack("<Q", n), sizes) for n in (0, 4, 6, 2**63)}
    for i in range(5):
        cases[f"length {i} negative"] = (34 + 4 * i, struct.pack("<i", -5), "negative length")
        cases[f"pointer {i} wrong"] = (54 + 8 * i, struct.pack("<q", 3), f"sequence {i} points to byte 3")
    for i in range(4):
        cases[f"length {i} larger"] = (34 + 4 * i, struct.pack("<i", 50), f"sequence {i + 1} points to byte")
    cases["last length larger"] = (50, struct.pack("<i", 2), "is truncated")
    cases["last length smaller"] = (50, struct.pack("<i", 0), "does not belong to its index")
    cases["first document"] = (94, struct.pack("<q", 1), "starts with 1")
    cases["falling documents"] = (102, struct.pack("<q", 3), "falls from 3 to 2")
    cases["negative document"] = (110, struct.pack("<q", -1), "falls from")
    cases["last document"] = (126, struct.pack("<q", 6), "ends with 6")
    return cases


def test_there_are_many_kinds_of_damage() -> None:
    assert len(damaged_indices()) >= 70


@pytest.mark.parametrize("name", damaged_indices())
def test_damaged_index_is_refused(tmp_path: Path, name: str) -> None:
    prefix = write_example(tmp_path / "d")
    position, change, message = damaged_indices()[name]
    data = Path(prefix + ".idx").read_bytes()
    assert len(data) == 134
    if position is None:
        assert isinstance(change, int)
        data = data[:change]
    else:
        assert isinstance(change, bytes)
        data = put(data, position, change)
    Path(prefix + ".idx").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("num_bytes", [0, 1, 17])
def test_truncated_tokens_are_refused(tmp_path: Path, num_bytes: int) -> None:
    prefix = write_example(tmp_path / "d")
    os.truncate(prefix + ".bin", num_bytes)
    with pytest.raises(ValueError, match=rf"is truncated: it has {num_bytes} bytes, the sequences of .* need 18"):
        IndexedDataset(prefix)


def test_tokens_of_another_dataset_are_refused(tmp_path: Path) -> None:
    prefix = write_example(tmp_path / "d")
    with open(prefix + ".bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match="does not belong to its index: it has 20 bytes"):
        IndexedDataset(prefix)


def test_modes_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open it with multimodal=True"):
        IndexedDataset(write_example(tmp_path / "m", multimodal=True))
    with pytest.raises(ValueError, match="open it with multimodal=False"):
        IndexedDataset(write_example(tmp_path / "p"), multimodal=True)


def test_missing_files_are_named(tmp_path: Path) -> None:
    prefix = write_example(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"no file .*d\.bin\.bin .*give the path without its suffix"):
        IndexedDataset(prefix + ".bin")
    os.remove(prefix + ".idx")
    assert not IndexedDataset.exists(prefix)
    with pytest.raises(FileNotFoundError, match=r"no file .*d\.idx"):
        IndexedDataset(prefix)


# -- interrupted writers -------------------------------------------------------------------------------


def test_nothing_appears_before_finalize(tmp_path: Path) -> None:
    old = write_example(tmp_path / "d")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedDatasetBuilder(old + ".bin") as builder:
        builder.add_item(torch.arange(100))
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def write_and_die(prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    builder.add_item(numpy.arange(1000000))
    builder.complete(f"{prefix}.idx")
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_writer_leaves_no_dataset_and_no_lock(tmp_path: Path) -> None:
    process = FORK.Process(target=write_and_die, args=(tmp_path / "d",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin.partial", "d.idx.partial"]
    assert IndexedDataset(write_example(tmp_path / "d"))[3].tolist() == SEQUENCES[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_two_writers_of_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.datasets.indexed_dataset_builder._LOCK_PATIENCE", 0.0)
    with IndexedDatasetBuilder(str(tmp_path / "d.bin")), pytest.raises(RuntimeError, match="another process"):
        IndexedDatasetBuilder(str(tmp_path / "d.bin"))


def write_too_much(prefix: Path, errors: Any) -> None:
    # a limit on the size of files stands for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
    try:
        with IndexedDatasetBuilder(f"{prefix}.bin") as builder:
            for _ in range(10):
                builder.add_item(numpy.arange(10000))
    except OSError as error:
        errors.send(str(error))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write_too_much, args=(tmp_path / "d", sender))
    process.start()
    assert receiver.poll(30) and receiver.recv() == f"[Errno 27] File too large: '{tmp_path}/d.bin'"
    process.join()
    assert list(tmp_path.iterdir()) == []
