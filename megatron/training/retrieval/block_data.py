"""The vectors of all blocks of a corpus in a file: a pickle of `{"embed_data": {id: fp16 vector}}`."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from megatron.core.dist_checkpointing.dcp_metadata import RestrictedUnpickler
from megatron.core.dist_checkpointing.safe_load import known_names


def _from_buffer(content: bytes, dtype: numpy.dtype, shape: tuple[int, ...], order: str) -> numpy.ndarray:
    return numpy.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


_NAMES = known_names() | {
    "_codecs.encode": _encoded,
    **{f"numpy.{module}.numeric._frombuffer": _from_buffer for module in ("core", "_core")},
}
"""What older and newer versions of Python write of arrays."""


@dataclass
class BlockData:
    """Vectors under the ids of their blocks or passages."""

    path: Path
    """The file of all of them."""
    embed_data: dict[int, numpy.ndarray] = field(default_factory=dict)
    """id -> [p] fp16."""

    def add_block_data(self, row_ids: list[int], block_embeds: numpy.ndarray) -> None:
        """Add vectors [n, p], rounded to fp16.

        Raises:
            ValueError: an id is there already.
        """
        for row_id, vector in zip(row_ids, numpy.asarray(block_embeds, numpy.float16)):
            if row_id in self.embed_data:
                raise ValueError(f"two blocks have the id {row_id}")
            self.embed_data[int(row_id)] = vector

    @property
    def shards(self) -> Path:
        """Folder of the parts that ranks write."""
        return self.path.with_name(f"{self.path.stem}_tmp")

    def save_shard(self, rank: int) -> None:
        """Write what this rank has."""
        self.shards.mkdir(parents=True, exist_ok=True)
        _write(self.shards / f"{rank}.pkl", self.embed_data)

    def merge_shards_and_save(self, num_shards: int) -> None:
        """Write the file from the shards of ranks 0 to `num_shards` - 1, and remove these. One rank calls this, after
        all have saved."""
        self.embed_data = {}
        parts = [self.shards / f"{rank}.pkl" for rank in range(num_shards)]
        for part in parts:
            found = _read(part)
            if twice := self.embed_data.keys() & found.keys():
                raise ValueError(f"{part}: other shards have blocks {sorted(twice)[:5]} too")
            self.embed_data |= found
        _write(self.path, self.embed_data)
        for part in parts:
            part.unlink()
        if not any(self.shards.iterdir()):
            self.shards.rmdir()

    @classmethod
    def load(cls, path: str | Path) -> BlockData:
        """What a file holds; nothing in it is run.

        Raises:
            ValueError: it is missing or something else.
        """
        return cls(Path(path), _read(Path(path)))


def _write(path: Path, embed_data: dict[int, numpy.ndarray]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        pickle.dump({"embed_data": embed_data}, file, protocol=4)
    os.replace(unfinished, path)


def _read(path: Path) -> dict[int, numpy.ndarray]:
    if not path.is_file():
        raise ValueError(f"there are no embeddings in {path}; tools/create_doc_index.py writes them")
    try:
        with path.open("rb") as file:
            content = RestrictedUnpickler(file, _NAMES).load()
        found = content["embed_data"]
        is_sound = all(isinstance(vector, numpy.ndarray) and vector.ndim == 1 for vector in found.values())
    except Exception as error:
        raise ValueError(f"{path} does not hold embeddings ({type(error).__name__}: {error})") from None
    if not is_sound or len({vector.shape for vector in found.values()}) > 1:
        raise ValueError(f"{path} does not hold embeddings: vectors of one width under each id are expected")
    return found
