"""From a configuration to the train, valid and test datasets, on every rank that needs them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import Blend, BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.rank_order import run_rank_zero_first
from megatron.core.datasets.utils import Split, normalize

logger = logging.getLogger(__name__)

MidLevelDataset = MegatronDataset
TopLevelDataset = BlendedDataset | MegatronDataset
DistributedDataset = TopLevelDataset | torch.utils.data.Dataset
_Bounds = list[tuple[float, float] | None]
_WHOLE: tuple[float, float] = (0.0, 1.0)


class BlendedMegatronDatasetBuilder:
    """Builds one dataset for each split: of one source, or a blend of several.

    Args:
        cls: class of the datasets that cut the samples.
        sizes: samples wanted of train, valid and test; None: all there are.
        is_built_on_rank: whether this rank needs the datasets.
        config: what to read and how to cut it.
    """

    def __init__(
        self,
        cls: type[MidLevelDataset],
        sizes: list[int | None],
        is_built_on_rank: Callable[[], bool],
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        if len(sizes) != len(Split):
            raise ValueError(f"sizes needs {len(Split)} entries (train, valid, test), got {sizes}")
        if config.mock and not hasattr(cls, "build_low_level_dataset"):
            raise ValueError(f"{cls.__name__} has no mock data: give a blend")
        self.cls = cls
        self.sizes = list(sizes)
        self.is_built_on_rank = is_built_on_rank
        self.config = config

    def build(self) -> list[Any]:
        """Datasets of train, valid and test; None for empty splits and on ranks that need none.

        With `multiple_validation_sets` that of valid is a list with one for each prefix.

        Called by all ranks. Where an index cache lacks files, rank 0 builds them and the others wait for the
        files, without a collective. An error on one rank is raised on all.
        """
        datasets = run_rank_zero_first(self._build_splits, self.is_built_on_rank())
        return [None] * len(Split) if datasets is None else datasets

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> DistributedDataset | Iterable | None:
        """`cls(*args)` on ranks that need it, None elsewhere; with `synchronize_ranks`, indices are built by rank 0."""
        if synchronize_ranks:
            return run_rank_zero_first(lambda: cls(*args), is_built_on_rank())
        return cls(*args) if is_built_on_rank() else None

    def _build_splits(self) -> list[Any]:
        config = self.config
        if config.mock:
            assert config.split_matrix is not None
            return list(self._build_source(None, config.split_matrix, self.sizes))
        if config.blend is not None:
            assert config.split_matrix is not None
            return self._build_blend(config.blend, config.split_matrix, self.sizes, single_needs_no_weight=True)
        assert config.blend_per_split is not None
        datasets: list[Any] = []
        for i, blend in enumerate(config.blend_per_split):
            if blend is None:
                datasets.append(None)
                continue
            bounds: _Bounds = [_WHOLE if j == i else None for j in range(len(Split))]
            if i == Split.valid.value and config.multiple_validation_sets:
                sources = self._build_sources(blend[0], [self.sizes] * len(blend[0]), bounds)
                datasets.append([splits[i] for splits in sources])
                continue
            datasets.append(self._build_blend(blend, bounds, self.sizes, single_needs_no_weight=False)[i])
        return datasets

    def _build_blend(
        self, blend: Blend, bounds: _Bounds, sizes: list[int | None], single_needs_no_weight: bool
    ) -> list[TopLevelDataset | None]:
        """Datasets of the splits that have bounds."""
        prefixes, weights = blend
        if len(prefixes) == 1 and (weights is None or not single_needs_no_weight):
            return list(self._build_source(prefixes[0], bounds, sizes))
        shares = None if weights is None else normalize(weights)
        sources = self._build_sources(prefixes, self._sizes_per_source(shares, sizes, len(prefixes)), bounds)
        return [
            None if bounds[i] is None else self._mix([splits[i] for splits in sources], shares, sizes[i])
            for i in range(len(Split))
        ]

    def _sizes_per_source(
        self, shares: list[float] | None, sizes: list[int | None], num_sources: int
    ) -> list[list[int | None]]:
        """For each source the samples to build: its share and a surplus, or (None) one pass over it."""
        if shares is None:
            return [[None] * len(sizes) for _ in range(num_sources)]
        surplus = 1 + self.config.mid_level_dataset_surplus
        return [
            [None if size is None else math.ceil(math.ceil(size * share) * surplus) for size in sizes]
            for share in shares
        ]

    def _mix(
        self, datasets: list[MidLevelDataset | None], shares: list[float] | None, size: int | None
    ) -> BlendedDataset | None:
        mixed = [dataset for dataset in datasets if dataset is not None]
        assert len(mixed) == len(datasets)
        if shares is None:
            lengths = [len(dataset) for dataset in mixed]
            return BlendedDataset(mixed, lengths, None if size is None else min(size, sum(lengths)), self.config)
        weights = shares if size is not None else [len(dataset) for dataset in mixed]
        total = None if size is None else sum(math.ceil(size * share) for share in shares)
        if total == 0:
            return None
        return BlendedDataset(mixed, weights, total, self.config)

    def _build_sources(
        self, prefixes: list[str], sizes: Sequence[list[int | None]], bounds: _Bounds
    ) -> list[list[MidLevelDataset | None]]:
        """For each prefix its splits, opened by several threads if so configured."""
        num_threads = self.config.num_dataset_builder_threads
        if num_threads <= 1:
            return [self._build_source(prefix, bounds, size) for prefix, size in zip(prefixes, sizes)]
        is_rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        # rank 0 works while all others wait for it
        with ThreadPoolExecutor(num_threads * 2 if is_rank_zero else num_threads) as pool:
            results = [
                pool.submit(copy_context().run, self._build_source, prefix, bounds, size)
                for prefix, size in zip(prefixes, sizes)
            ]
            try:
                return [result.result() for result in results]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _build_source(
        self, prefix: str | None, bounds: _Bounds, sizes: list[int | None]
    ) -> list[MidLevelDataset | None]:
        """The splits of one source."""
        low_level: Any = self.cls.build_low_level_dataset(prefix, self.config)
        num_elements = self.cls.numel_low_level_dataset(low_level)
        datasets: list[MidLevelDataset | None] = []
        for split, bound, size in zip(Split, bounds, sizes):
            if bound is None:
                datasets.append(None)
                continue
            begin, end = (int(round(fraction * float(num_elements))) for fraction in bound)
            indices = numpy.arange(begin, end, dtype=numpy.int32)
            datasets.append(self.cls(low_level, prefix, indices, size, split, self.config))
        return datasets
