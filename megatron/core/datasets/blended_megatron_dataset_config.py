"""Settings common to all datasets, and how a `--split` string cuts a corpus."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig
from megatron.core.datasets.utils import Split, normalize

Blend = tuple[list[str], list[float] | None]
"""Prefixes of the datasets, and their weights (None: as large as they are)."""


@dataclass
class BlendedMegatronDatasetConfig:
    """What to read and how to cut it. Without `blend` and `blend_per_split` the data is mock data."""

    random_seed: int
    """Seed of every shuffle; equal seeds give equal samples in equal order."""

    sequence_length: int
    """Tokens of a sample."""

    blend: Blend | None = None
    """Datasets that `split` cuts into train, valid and test; excludes `blend_per_split`."""

    blend_per_split: list[Blend | None] | None = None
    """One blend (or None) for each of train, valid and test; excludes `blend` and `split`."""

    split: str | None = None
    """Relative sizes of train, valid and test, such as "969, 30, 1"; needed by `blend`."""

    split_matrix: list[tuple[float, float] | None] | None = field(init=False, default=None)
    """For each split the begin and end of its part of the corpus, as fractions; derived from `split`."""

    num_dataset_builder_threads: int = 1
    """Threads that open the datasets of a blend."""

    path_to_cache: str | None = None
    """Directory of the index caches; None: beside each dataset, and none for blends and mock data."""

    mmap_bin_files: bool = True
    """Read token files through a memory map instead of plain reads."""

    object_storage_cache_path: str | None = None
    """Folder for the index files of data in object storage; needed by paths `s3://` and `msc://`."""

    multiple_validation_sets: bool = False
    """Make a dataset of each prefix of the validation blend, instead of one that mixes them."""

    mock: bool = field(init=False, default=False)
    """Whether the data is mock data; derived."""

    tokenizer: MegatronTokenizer | None = None
    """Tokenizer the data was made with; its identifiers are part of cache names."""

    mid_level_dataset_surplus: float = 0.005
    """Share of samples that each dataset of a blend is built larger than its weight asks."""

    @property
    def object_storage(self) -> ObjectStorageConfig | None:
        """How data in object storage is read."""
        folder = self.object_storage_cache_path
        return None if folder is None else ObjectStorageConfig(path_to_idx_cache=folder)

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {self.sequence_length}")
        if self.blend_per_split is not None and any(self.blend_per_split):
            self._check_blend_per_split()
            return
        if self.blend is not None:
            _check_blend(self.blend, "blend")
            if self.split is None:
                raise ValueError('blend needs split, the relative sizes of train, valid and test such as "969, 30, 1"')
        else:
            self.mock = True
            self.split = "1,1,1"
        self.split_matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(self.split))

    def _check_blend_per_split(self) -> None:
        assert self.blend_per_split is not None
        for name in ("blend", "split"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} and blend_per_split exclude each other, give one of them")
        if len(self.blend_per_split) != len(Split):
            raise ValueError(f"blend_per_split needs {len(Split)} entries, it has {len(self.blend_per_split)}")
        for split, blend in zip(Split, self.blend_per_split):
            if blend is not None:
                _check_blend(blend, f"blend_per_split for {split.name}")
        valid = self.blend_per_split[Split.valid.value]
        if self.multiple_validation_sets and valid is not None and valid[1] is not None:
            raise ValueError(
                f"several validation sets are not mixed: leave out their weights {valid[1]} "
                "(--multiple-validation-sets)"
            )


def _check_blend(blend: Blend, name: str) -> None:
    prefixes, weights = blend
    if not prefixes:
        raise ValueError(f"{name} names no dataset")
    if weights is not None and len(weights) != len(prefixes):
        raise ValueError(f"{name} has {len(prefixes)} datasets but {len(weights)} weights")
    if weights is not None and any(not weight > 0 for weight in weights):
        raise ValueError(f"{name}: every weight must be positive, got {weights}")


def parse_and_normalize_split(split: str) -> list[float]:
    """Fractions of train, valid and test: the numbers in `split`, missing ones 0, divided by their sum."""
    numbers = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(numbers) <= len(Split):
        raise ValueError(f"split needs 1 to {len(Split)} numbers such as '969, 30, 1', got {split!r}")
    return normalize(numbers + [0.0] * (len(Split) - len(numbers)))


def convert_split_vector_to_split_matrix(
    vector_a: list[float], vector_b: list[float] | None = None
) -> list[tuple[float, float] | None]:
    """Begin and end of each split as fractions of the corpus, None for empty splits.

    With a second vector, each split is what its parts under both vectors have in common.

    >>> convert_split_vector_to_split_matrix([0.99, 0.01, 0.0])
    [(0, 0.99), (0.99, 1.0), None]
    """
    bounds = _bounds(vector_a)
    if vector_b is not None and not numpy.allclose(vector_a, vector_b):
        bounds = [
            (max(begin_a, begin_b), min(end_a, end_b))
            for (begin_a, end_a), (begin_b, end_b) in zip(bounds, _bounds(vector_b))
        ]
    return [(begin, end) if begin < end else None for begin, end in bounds]


def _bounds(vector: list[float]) -> list[tuple[float, float]]:
    # starts at the integer 0, which is how it stands in the cache names
    sums = list(itertools.accumulate(vector, initial=0))
    return list(zip(sums[:-1], sums[1:]))
