"""Archives that torch reads although torch did not write them, and the other way round."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.archive import ALIGNMENT, frame, read_tensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
SHAPES = [(), (1,), (3, 4), (2, 1, 5), (0, 3)]


def archive(tensor: torch.Tensor, offset: int = 0) -> bytes:
    around = frame(tensor.dtype, tuple(tensor.shape), offset)
    assert around is not None
    return around[0] + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + around[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_and_we_read_each_other(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = torch.randn(shape).mul(5).to(dtype)
        ours = torch.load(io.BytesIO(archive(tensor)), weights_only=True)
        assert ours.dtype == dtype and torch.equal(ours, tensor)
        file = io.BytesIO()
        torch.save(tensor, file)
        theirs = read_tensor(memoryview(bytearray(file.getvalue())))
        assert theirs.dtype == dtype and torch.equal(theirs, tensor)


def test_tensor_bytes_are_aligned_wherever_the_archive_begins() -> None:
    for offset in (0, 1, 63, 64, 1000):
        head, _ = frame(torch.float32, (5,), offset) or (b"", b"")
        assert (offset + len(head)) % ALIGNMENT == 0


def test_views_of_other_memory_are_read() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    for view in (whole.t(), whole[1:3, ::2], whole[2]):
        file = io.BytesIO()
        torch.save(view, file)
        assert torch.equal(read_tensor(memoryview(bytearray(file.getvalue()))), view)


def test_archives_larger_than_4_gib(tmp_path: Path) -> None:
    shape = (5, 2**28)  # 5 GiB of fp32, a hole in the file except for its last element
    head, tail = frame(torch.float32, shape, 0) or (b"", b"")
    with open(tmp_path / "large", "wb") as file:
        file.write(head)
        file.seek(len(head) + 5 * 2**30 - 4)
        file.write(struct.pack("<f", 1.5) + tail)
    tensor = torch.load(tmp_path / "large", mmap=True, weights_only=True)
    assert tensor.shape == shape and tensor[4, -1] == 1.5 and tensor[0, 0] == 0


def rewritten(data: bytes, **changes: bytes) -> bytes:
    """A compressed or changed copy of an archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            source_bytes = b"\0" * 4096 if info.filename.endswith("data/0") else source.read(info)
            target.writestr(info.filename, changes.get(info.filename.split("/", 1)[1], source_bytes))
    return file.getvalue()


def test_what_is_no_archive_of_a_tensor_is_refused() -> None:
    data = archive(torch.ones(1024))
    refused = {
        "not a zip file": b"garbage",
        "compressed": rewritten(data),
        "End-of-central|not a zip|truncated": data[:-10],
        "claims .* bytes": rewritten(data, **{"data.pkl": bytes(2 << 20)}),
        "not part of a tensor's description": rewritten(data, **{"data.pkl": b"cos\nsystem\n(S'true'\ntR."}),
        "does not hold a tensor": rewritten(data, **{"data.pkl": b"\x80\x02K\x01."}),
        "big-endian": rewritten(data, byteorder=b"big"),
    }
    for message, content in refused.items():
        with pytest.raises(CheckpointingException, match=message):
            read_tensor(memoryview(bytearray(content)))


def test_a_description_may_not_reach_beyond_its_bytes() -> None:
    head, tail = frame(torch.float32, (100,), 0) or (b"", b"")
    small_head, small_tail = frame(torch.float32, (10,), 0) or (b"", b"")
    description = head[head.index(b"\x80\x02") : head.index(b"PK", 4)]
    own = small_head[small_head.index(b"\x80\x02") : small_head.index(b"PK", 4)]
    assert len(description) == len(own), "the lie must have the length of the truth"
    content = small_head.replace(own, description) + bytes(40) + small_tail
    with pytest.raises(CheckpointingException, match="it has 10 elements, its description speaks of 100|Bad CRC"):
        read_tensor(memoryview(bytearray(content)))
