"""Directories of Hugging Face transformers: config.json and tensors, read and written without that package.

Reading opens nothing but JSON, safetensors and, where there are no safetensors, `pytorch_model*.bin` through the
restricted reader. Writing knows every byte's place before it reads a tensor, so that several ranks can share the
files and none holds more than one parameter.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.durable import sync_directory, write_durably
from megatron.core.dist_checkpointing.safe_load import safe_torch_load
from megatron.core.dist_checkpointing.strategies.catalog import Place
from megatron.core.dist_checkpointing.strategies.file_plan import segment_bytes
from megatron.core.dist_checkpointing.strategies.json_state import dtype_name, dtype_of
from megatron.core.dist_checkpointing.strategies.reading import read_bytes
from megatron.core.dist_checkpointing.strategies.safetensors import read_header

from .families import family_of_config
from .family import Family, Settings
from .weights import ModelShape, Weight
from .whole_state import WholeState

CONFIG = "config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
SHARD_BYTES = 5 << 30


# --- reading --------------------------------------------------------------------------------------------


class HFFolder:
    """The tensors of a directory by their names there.

    Raises:
        CheckpointingException: the directory has no model, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self._tensors: dict[str, _StoredTensor] = {}
        for file in self._files():
            self._tensors.update(_open(file))

    def _files(self) -> list[Path]:
        for index, single in ((INDEX, SINGLE), (TORCH_INDEX, TORCH_SINGLE)):
            if (self.path / index).is_file():
                names = set(read_json(self.path / index)["weight_map"].values())
                outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
                if outside:
                    raise CheckpointingException(f"{self.path / index} names files outside of it: {outside[:3]}")
                missing = [name for name in sorted(names) if not (self.path / name).is_file()]
                if missing:
                    raise CheckpointingException(f"{self.path / index}: {', '.join(missing[:5])} missing")
                return sorted(self.path / name for name in names)
            if (self.path / single).is_file():
                return [self.path / single]
        raise CheckpointingException(f"{self.path} has neither {SINGLE}, {INDEX}, {TORCH_SINGLE} nor {TORCH_INDEX}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def meta(self, name: str) -> Tensor:
        """Shape and type."""
        return self._tensors[name].meta

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self._tensors[name].read()

    @property
    def family(self) -> Family:
        """What config.json says that the model is."""
        return family_of_config(self.config)

    def settings(self) -> Settings:
        """Our settings of the model; raises `NotExpressible`."""
        return self.family.settings(self.config)


@dataclass(frozen=True)
class _StoredTensor:
    meta: Tensor
    read: Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointingException`."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointingException(f"{path} is missing: this is no directory of transformers") from None
    except ValueError as error:
        raise CheckpointingException(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointingException(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _open(path: Path) -> dict[str, _StoredTensor]:
    if path.suffix == ".safetensors":
        return dict(_open_safetensors(path))
    content = safe_torch_load(path, mmap=True)
    if not isinstance(content, dict):
        raise CheckpointingException(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return {name: _StoredTensor(value.to("meta"), lambda v=value: v) for name, value in tensors.items()}


def _open_safetensors(path: Path) -> Iterator[tuple[str, _StoredTensor]]:
    header, start = read_header(path)
    size = path.stat().st_size
    for name, row in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = (int(n) + start for n in row["data_offsets"])
            meta = torch.empty([int(n) for n in row["shape"]], dtype=dtype_of(row["dtype"]), device="meta")
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointingException(f"{path}: {name} is damaged ({error})") from error
        if not start <= first <= last <= size or last - first != meta.numel() * meta.element_size():
            raise CheckpointingException(f"{path}: {name} lies at {first} to {last} of {size} bytes")
        yield name, _StoredTensor(meta, partial(_read, path, Place(path.name, first, last - first), meta))


def _read(path: Path, place: Place, meta: Tensor) -> Tensor:
    if not place.length:
        return torch.empty(meta.shape, dtype=meta.dtype)
    return torch.frombuffer(bytearray(read_bytes(place, path.parent)), dtype=meta.dtype).reshape(meta.shape)


class HFState(WholeState):
    """A directory's model under our names.

    Args:
        shape: of our model; default: the one that config.json describes.
    """

    def __init__(self, folder: HFFolder, shape: ModelShape | None = None, family: Family | None = None) -> None:
        self.folder, self.family = folder, family or folder.family
        shape = shape or ModelShape.of_settings(self.family.settings(folder.config))
        self._weights = {weight.ours: weight for weight in self.family.weights(shape)}
        missing = sorted(
            name
            for weight in self._weights.values()
            for name in weight.theirs
            if self._there(name) is None and not weight.ours.startswith(self.family.optional or ("\0",))
        )
        if missing:
            more = " ..." * (len(missing) > 5)
            raise CheckpointingException(f"{folder.path} lacks {len(missing)} tensors: {', '.join(missing[:5])}{more}")

    def _there(self, name: str) -> str | None:
        """The name in the directory, where a model without head has it without the model's prefix."""
        if name in self.folder:
            return name
        short = name.removeprefix(self.family.root)
        return short if short in self.folder else None

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if name in self)

    def __contains__(self, name: object) -> bool:
        return name in self._weights and all(self._there(part) is not None for part in self._weights[name].theirs)

    def meta(self, name: str) -> Tensor:
        return self._pack(name, self.folder.meta)

    def read(self, name: str) -> Tensor:
        return self._pack(name, self.folder.read)

    def _pack(self, name: str, get: Any) -> Tensor:
        weight = self._weights[name]
        try:
            return weight.pack([get(self._there(part)) for part in weight.theirs])
        except RuntimeError as error:
            shapes = ", ".join(
                f"{part} {list(self.folder.meta(self._there(part) or '').shape)}" for part in weight.theirs
            )
            raise CheckpointingException(f"{self.folder.path}: {shapes} do not make up {name}: {error}") from error


# --- writing --------------------------------------------------------------------------------------------


@dataclass
class _File:
    name: str
    weights: list[Weight] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    num_bytes: int = 0

    def add(self, weight: Weight, parts: Iterable[Tensor]) -> None:
        self.weights.append(weight)
        for name, part in zip(weight.theirs, parts):
            end = self.num_bytes + part.numel() * part.element_size()
            offsets = [self.num_bytes, end]
            self.header[name] = {"dtype": dtype_name(part.dtype), "shape": list(part.shape), "data_offsets": offsets}
            self.num_bytes = end

    def segments(self, state: WholeState, on_progress: Any) -> Iterator[Any]:
        text = json.dumps(self.header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        yield struct.pack("<Q", len(text)) + text
        for weight in self.weights:
            for part in weight.unpack(state.read(weight.ours)):
                yield segment_bytes(part)
                on_progress(part.numel() * part.element_size())


def plan_files(state: WholeState, weights: Iterable[Weight], shard_bytes: int = SHARD_BYTES) -> list[_File]:
    """Files of about `shard_bytes` that hold the parameters that `state` has.

    Raises:
        CheckpointingException: it has parameters that the key map does not speak of.
    """
    files, seen = [_File("")], set()
    for weight in weights:
        if weight.ours not in state:
            continue
        seen.add(weight.ours)
        parts = weight.unpack(state.meta(weight.ours))
        size = sum(part.numel() * part.element_size() for part in parts)
        if files[-1].weights and files[-1].num_bytes + size > shard_bytes:
            files.append(_File(""))
        files[-1].add(weight, parts)
    left = [name for name in state if name not in seen]
    if left:
        raise CheckpointingException(
            f"{len(left)} parameters have no place in this kind of model: {', '.join(left[:5])}"
        )
    for n, file in enumerate(files, 1):
        file.name = SINGLE if len(files) == 1 else f"model-{n:05d}-of-{len(files):05d}.safetensors"
    return files


def write_hf_files(
    directory: Path, state: WholeState, files: list[_File], on_progress: Any = lambda num_bytes: None
) -> None:
    """Write some of the files of `plan_files`."""
    for file in files:
        write_durably(directory / file.name, file.segments(state, on_progress))


def write_hf_config(directory: Path, config: Mapping[str, Any], files: list[_File], tokenizer: Path | None) -> None:
    """Write what makes the files a model: config.json, the index, and a copy of the tokenizer's files."""
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.header if name != "__metadata__"}
        total = sum(file.num_bytes for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_durably(directory / INDEX, [json.dumps(index, indent=2).encode()])
    dtypes = {row["dtype"] for file in files for name, row in file.header.items() if name != "__metadata__"}
    name = str(dtype_of(sorted(dtypes)[0])).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    content = {**config, "dtype": name, "torch_dtype": name}
    for file_name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / file_name).is_file():
            shutil.copyfile(tokenizer / file_name, directory / file_name)
    write_durably(directory / CONFIG, [json.dumps(content, indent=2).encode()])
    sync_directory(directory)


def require_free_or_hf(directory: str | Path) -> None:
    """Raise `CheckpointingException` if writing a model there would replace anything else than a model."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir()) and not (path / CONFIG).is_file()):
        raise CheckpointingException(f"{path} exists and is no directory of transformers; it is left as it is")


def unfinished(directory: Path) -> Path:
    """A new directory beside the final one, to write into."""
    require_free_or_hf(directory)
    path = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    path.mkdir(parents=True)
    return path


def publish(written: Path, directory: Path) -> None:
    """Give a completely written directory its name; one that is there is replaced."""
    replaced = written.with_name(written.name + ".replaced")
    if directory.exists():
        os.rename(directory, replaced)
    os.rename(written, directory)
    sync_directory(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_hf_folder(
    directory: str | Path,
    state: WholeState,
    family: Family,
    shape: ModelShape,
    config: Mapping[str, Any],
    tokenizer: Path | None = None,
    on_progress: Any = lambda num_bytes: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a directory of transformers, whole or not at all. One process; tensor by tensor."""
    final = Path(directory)
    files = plan_files(state, family.weights(shape), shard_bytes)
    written = unfinished(final)
    try:
        write_hf_files(written, state, files, on_progress)
        write_hf_config(written, config, files, tokenizer)
        publish(written, final)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
