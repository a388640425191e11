"""Base of the datasets that cut samples out of one low-level dataset."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.sample_origin import SampleOrigin
from megatron.core.datasets.utils import Split

LowLevelDataset = IndexedDataset | Iterable


class MegatronDataset(ABC, torch.utils.data.Dataset):
    """Samples of one split of one low-level dataset.

    Args:
        dataset: the low-level dataset.
        dataset_path: where it was read from, None for mock data.
        indices: its elements that belong to this split.
        num_samples: samples wanted at least; None: one pass over the data.
        index_split: the split.
        config: settings.
    """

    def __init__(
        self,
        dataset: LowLevelDataset,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        self.dataset: Any = dataset
        self.dataset_path = dataset_path
        self.indices = indices
        self.num_samples = num_samples
        self.index_split = index_split
        self.config = config
        self.unique_identifiers = self._describe()
        self.unique_description, self.unique_description_hash = describe_uniquely(self.unique_identifiers)
        self.built_anew_on_cache_miss = False

    def _describe(self) -> OrderedDict[str, Any]:
        """Everything that the samples depend on; names the index cache."""
        identifiers: OrderedDict[str, Any] = OrderedDict()
        identifiers["class"] = type(self).__name__
        identifiers["dataset_path"] = self.dataset_path
        identifiers["num_samples"] = self.num_samples
        identifiers["index_split"] = self.index_split.name
        for name in self._key_config_attributes():
            identifiers[name] = getattr(self.config, name)
        return identifiers

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """Settings that the samples depend on; subclasses add theirs."""
        return ["random_seed", "sequence_length", "split", "split_matrix", "tokenizer"]

    def _index_cache(self) -> IndexCache:
        """Files of this dataset's index: in the configured directory, else beside the data, else none."""
        directory = self.config.path_to_cache
        if directory is None and isinstance(self.dataset, IndexedDataset) and not self.config.mock:
            directory = os.path.join(self.dataset.local_prefix, "cache", f"{type(self).__name__}_indices")
        return IndexCache(directory, self._index_name(), self.unique_description, self._index_sources())

    def _index_sources(self) -> list[str]:
        """Files that the index is a function of, beside what the description says."""
        return [self.dataset.index.path] if isinstance(self.dataset, IndexedDataset) else []

    def _index_name(self) -> str:
        """First part of the names of the index files."""
        return f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"

    @staticmethod
    @abstractmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Number of elements that the split is taken of."""

    @staticmethod
    @abstractmethod
    def build_low_level_dataset(dataset_path: str | None, config: BlendedMegatronDatasetConfig) -> Any:
        """Open the low-level dataset at a path."""

    def origin(self, idx: int) -> SampleOrigin:
        """What sample `idx` was made of."""
        raise NotImplementedError(f"{type(self).__name__} does not record where its samples come from")

    def samples_per_epoch(self) -> float | None:
        """Samples that one pass over the data gives; None: not known."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, idx: int) -> Mapping[str, torch.Tensor | numpy.ndarray]:
        """One sample."""


def _identifiers_of(value: Any) -> Any:
    return value.unique_identifiers


@lru_cache(maxsize=256)
def _indented(text: str) -> str:
    """JSON text again, over several lines; datasets of a blend have most of theirs in common."""
    return json.dumps(json.loads(text), indent=4)


def describe_uniquely(identifiers: OrderedDict[str, Any], written: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The identifiers as JSON text with indentations of 4, and the MD5 hash of that text.

    Args:
        written: for some names, their values as such text already.
    """
    texts = {
        name: json.dumps(value, default=_identifiers_of)
        for name, value in identifiers.items()
        if name not in (written or {})
    }
    texts = {name: _indented(text) if text[0] in "[{" else text for name, text in texts.items()} | dict(written or {})
    rows = ",\n".join(f"{json.dumps(name)}: {texts[name]}" for name in identifiers)
    text = "{\n    " + rows.replace("\n", "\n    ") + "\n}"
    return text, hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
