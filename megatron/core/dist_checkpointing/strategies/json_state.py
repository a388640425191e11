"""State dicts as JSON: readable by anybody, and nothing in them can run.

Values that JSON lacks are objects with one key that starts with a dollar sign: `{"$tuple": [1, 2]}`. Tensors and arrays
go where the caller puts them.
"""

from __future__ import annotations

import argparse
import base64
import enum
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..core import CheckpointingException
from ..safe_load import Stub, registered_class

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Types of tensors by the names that safetensors files use."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

PutTensor = Callable[[torch.Tensor], Any]
GetTensor = Callable[[Any], torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type in safetensors files."""
    if dtype not in DTYPE_NAMES:
        raise CheckpointingException(f"tensors of type {dtype} cannot be stored in safetensors files")
    return DTYPE_NAMES[dtype]


def dtype_of(name: Any) -> torch.dtype:
    """Inverse of `dtype_name`."""
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointingException(f"{name!r} is no type of tensors")
    return DTYPES[name]


# ---- encoding ----


def encode(value: Any, put_tensor: PutTensor, path: str = "") -> Any:
    """`value` as what `json.dumps(..., allow_nan=False)` takes; `put_tensor` returns what stands for a tensor.

    Raises:
        CheckpointingException: a value that cannot be told in JSON; the message has its path.
    """

    def inner(item: Any, name: Any) -> Any:
        return encode(item, put_tensor, f"{path}/{name}")

    def each(items: Any) -> list[Any]:
        return [inner(item, i) for i, item in enumerate(items)]

    match value:
        case enum.Enum():
            return {"$enum": [f"{type(value).__module__}.{type(value).__qualname__}", value.name]}
        case None | bool() | str():
            return value
        case np.generic():
            return inner(value.item(), "")
        case int():
            return int(value)
        case float():
            return value if math.isfinite(value) else {"$float": repr(value)}
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: inner(item, key) for key, item in value.items()}
            return {"$dict": [[inner(key, "key"), inner(item, key)] for key, item in value.items()]}
        case list():
            return each(value)
        case tuple():
            return {"$tuple": each(value)}
        case set() | frozenset():
            return {"$set": each(sorted(value, key=repr))}
        case bytes() | bytearray():
            return {"$bytes": base64.b64encode(value).decode()}
        case torch.Tensor():
            return {"$tensor": put_tensor(value.detach())}
        case np.ndarray():
            return {"$array": put_tensor(torch.from_numpy(np.ascontiguousarray(value))), "$shape": list(value.shape)}
        case torch.dtype():
            return {"$dtype": str(value).removeprefix("torch.")}
        case argparse.Namespace():
            return {"$namespace": inner(vars(value), "args")}
        case pathlib.PurePath():
            return {"$path": str(value)}
    raise CheckpointingException(f"{path or 'the state'}: a {type(value).__name__} cannot be stored as JSON")


def inline_tensor(tensor: torch.Tensor) -> Any:
    """A small tensor written out within the JSON."""
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


# ---- decoding ----


def decode(value: Any, get_tensor: GetTensor) -> Any:
    """Inverse of `encode`.

    Raises:
        CheckpointingException: the JSON says what no `encode` has written.
    """
    try:
        return _decode(value, get_tensor)
    except CheckpointingException:
        raise
    except Exception as error:
        raise CheckpointingException(f"not a state as JSON ({type(error).__name__}: {error})") from error


def _decode(value: Any, get: GetTensor) -> Any:
    if isinstance(value, list):
        return [_decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item, get) for key, item in value.items()}
    content = value[tag]
    match tag:
        case "$float":
            return float({"nan": "nan", "inf": "inf", "-inf": "-inf"}[content])
        case "$dict":
            return {_decode(key, get): _decode(item, get) for key, item in content}
        case "$tuple":
            return tuple(_decode(item, get) for item in content)
        case "$set":
            return {_decode(item, get) for item in content}
        case "$bytes":
            return base64.b64decode(content, validate=True)
        case "$tensor":
            return get(content)
        case "$array":
            return get(content).numpy().reshape([int(size) for size in value["$shape"]])
        case "$dtype":
            return _torch_dtype(content)
        case "$namespace":
            return argparse.Namespace(**_decode(content, get))
        case "$path":
            return pathlib.PurePosixPath(content)
        case "$enum":
            path, name = content
            cls = registered_class(path)
            return cls[name] if isinstance(cls, type) and issubclass(cls, enum.Enum) else Stub(path, name)
    raise CheckpointingException(f"unknown kind of value {tag!r}")


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointingException(f"{name!r} is no type of tensors")
    return dtype


def outline_tensor(content: Any) -> torch.Tensor:
    """Inverse of `inline_tensor`."""
    dtype, shape = dtype_of(content["dtype"]), [int(size) for size in content["shape"]]
    data = bytearray(base64.b64decode(content["data"], validate=True))
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
