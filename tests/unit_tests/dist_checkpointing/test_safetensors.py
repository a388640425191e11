"""The format without pickles: other readers open its files, everything comes back, lies are refused."""

import argparse
import enum
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.safe_load import is_stub, register_safe_class
from megatron.core.dist_checkpointing.strategies.json_state import (
    decode,
    encode,
    inline_tensor,
    outline_tensor,
)
from megatron.core.enums import ModelType
from tests.worker_pool import run_ranks

register_safe_class(ModelType)


def state() -> dict:
    return {
        "w": ShardedTensor.from_rank_offsets("layers.w", torch.arange(6.0).reshape(2, 3), (0, 0, 2)),
        "w1": ShardedTensor.from_rank_offsets("layers.w", -torch.arange(6.0).reshape(2, 3), (0, 1, 2)),
        "b": ShardedTensor.from_rank_offsets("b", torch.ones(3, dtype=torch.bfloat16)),
        "flag": ShardedTensor.from_rank_offsets("flag", torch.tensor([True])),
        "f": ShardedTensor.from_rank_offsets_flat("f", torch.arange(6.0), (2, 3), flattened_range=slice(0, 6)),
        "rng": ShardedObject("rng", rng(), (1,), (0,)),
        "iteration": 3,
    }


def rng() -> dict:
    return {"a": torch.arange(5), "n": np.arange(3, dtype=np.uint32), "t": (1, None)}


def blank() -> dict:
    request: dict[str, Any] = {}
    for key, value in state().items():
        if isinstance(value, ShardedTensor):
            value.data = torch.zeros_like(value.data)
            request[key] = value
        elif isinstance(value, ShardedObject):
            request[key] = value.without_data()
    return request


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dist_checkpointing.save(state(), tmp_path, ("safetensors", 1), content_metadata={"k": 1})
    return tmp_path


def test_files_of_the_format(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    data = {"__0_0.safetensors", "__0_1.safetensors"}
    assert names == {"common.json", "checkpoint.index.json", "metadata.json", "manifest.json", *data}
    config = json.loads((checkpoint / "metadata.json").read_text())
    assert (config["sharded_backend"], config["common_backend"]) == ("safetensors", "json")
    for path in checkpoint.iterdir():
        assert b"PK\x03\x04" not in path.read_bytes() and b"ctorch" not in path.read_bytes()
    assert json.loads((checkpoint / "common.json").read_text()) == {"iteration": 3, "content_metadata": {"k": 1}}


def test_the_safetensors_package_opens_the_files(checkpoint: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= safetensors.load_file(path)
    assert torch.equal(tensors["layers.w@2.0"], -torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors["b"], torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(tensors["f"], torch.arange(6.0).reshape(1, 1, 6))


def test_everything_comes_back(checkpoint: Path) -> None:
    loaded, expected = dist_checkpointing.load(blank(), checkpoint), state()
    for key, value in expected.items():
        if isinstance(value, ShardedTensor):
            assert torch.equal(loaded[key], value.data), key
    assert torch.equal(loaded["rng"]["a"], torch.arange(5)) and loaded["rng"]["t"] == (1, None)
    np.testing.assert_array_equal(loaded["rng"]["n"], np.arange(3, dtype=np.uint32))
    assert loaded["iteration"] == 3 and dist_checkpointing.load_content_metadata(checkpoint) == {"k": 1}
    assert set(dist_checkpointing.load_tensors_metadata(checkpoint)) == {"layers.w", "b", "flag", "f"}


def damaged(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def claim_outside(index: dict) -> None:
    index["tensors"]["b"]["chunks"][0]["place"][0] = "../../etc/passwd"


def claim_more(index: dict) -> None:
    index["tensors"]["b"]["chunks"][0]["sizes"] = [10**12]
    index["tensors"]["b"]["shape"] = [10**12]


def claim_other_type(index: dict) -> None:
    index["tensors"]["b"]["dtype"] = "F32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claim_outside, "no place in a file of the checkpoint"),
        (claim_more, r"shape \[1000000000000\] in the checkpoint, \[3\] expected"),
        (claim_other_type, "6 bytes for 3 elements"),
        (lambda index: index.pop("tensors"), "is damaged"),
        (lambda index: index.update(version=7), "version 7"),
    ],
)
def test_an_index_that_lies_is_refused(checkpoint: Path, change: Any, message: str) -> None:
    damaged(checkpoint / "checkpoint.index.json", change)
    with pytest.raises(CheckpointingException, match=message):
        dist_checkpointing.load(blank(), checkpoint)


def test_a_file_that_lies_about_its_header_is_refused(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(struct.pack("<Q", 10**15))
    with pytest.raises(CheckpointingException, match="claims a header of"):
        dist_checkpointing.load(blank(), checkpoint)


class Unknown(enum.Enum):
    A = 1


VALUES: list[Any] = [
    None, True, 3, -(10**30), 0.1, math.inf, "text", [1, [2]], (1, (2, "x")), {1, 2}, b"\x00\xff", {},
    {"a": {"b": 1}}, {1: "x", (2, 3): None}, {"$tuple": 1}, torch.bfloat16, np.float32(0.5),
    ModelType.encoder_or_decoder,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_survive_json(value: Any) -> None:
    text = json.dumps(encode(value, inline_tensor), allow_nan=False)
    back = decode(json.loads(text), outline_tensor)
    assert back == value and (type(back) is type(value) or isinstance(value, np.generic))


def test_composite_values_survive_json() -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, sizes=(1, 2), backend=ModelType.encoder_or_decoder),
        "tensor": torch.randn(2, 3).bfloat16(),
        "empty": torch.zeros(0, 2),
        "array": np.arange(4.0).reshape(2, 2),
        "unknown": Unknown.A,
    }
    back = decode(json.loads(json.dumps(encode(value, inline_tensor))), outline_tensor)
    assert vars(back["args"]) == vars(value["args"])
    assert torch.equal(back["tensor"], value["tensor"]) and back["empty"].shape == (0, 2)
    np.testing.assert_array_equal(back["array"], value["array"])
    assert is_stub(back["unknown"])
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, inline_tensor))), outline_tensor))


def test_what_json_cannot_tell_is_named() -> None:
    with pytest.raises(CheckpointingException, match="/a/1: a function cannot be stored as JSON"):
        encode({"a": [1, test_what_json_cannot_tell_is_named]}, inline_tensor)


@pytest.mark.parametrize("text", ['{"$enum": 3}', '{"$what": 1}', '{"$bytes": "&"}', '{"$dtype": "load"}'])
def test_json_that_encode_never_writes_is_refused(text: str) -> None:
    with pytest.raises(CheckpointingException):
        decode(json.loads(text), outline_tensor)


def save_and_load(directory: str) -> None:
    rank = torch.distributed.get_rank()
    shard = ShardedTensor.from_rank_offsets("w", torch.full((2,), float(rank)), (0, rank, 2))
    dist_checkpointing.save({"w": shard}, directory, ("safetensors", 1))
    whole = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4), replica_id=rank)}
    assert dist_checkpointing.load(whole, directory)["w"].tolist() == [0, 0, 1, 1]


def test_several_ranks(tmp_path: Path) -> None:
    run_ranks(2, save_and_load, str(tmp_path))
