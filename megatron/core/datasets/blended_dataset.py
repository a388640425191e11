"""Several datasets as one, mixed in fixed proportions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.helpers import build_blending_indices
from megatron.core.datasets.index_cache import IndexCache, check_array
from megatron.core.datasets.megatron_dataset import MegatronDataset, describe_uniquely
from megatron.core.datasets.sample_origin import SampleOrigin
from megatron.core.datasets.utils import normalize

_MAX_DATASETS = 32766  # dataset numbers are stored as int16


class BlendedDataset(torch.utils.data.Dataset):
    """Samples of several datasets; at every point each has given the share that its weight says, to within
    about one.

    Args:
        datasets: what to mix, all of the same split.
        weights: one positive number for each.
        size: number of samples. None: all samples of all datasets, the weights then are their lengths.
        config: settings; with `path_to_cache` the index is kept in files.

    Raises:
        IndexError: the mixture needs more samples of a dataset than it has.
    """

    def __init__(
        self,
        datasets: list[MegatronDataset],
        weights: Sequence[int | float],
        size: int | None,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        _check_mixture(datasets, weights, size)
        self.datasets = datasets
        self.split = datasets[0].index_split
        self.weights = list(weights) if size is None else normalize(weights)
        self.size = sum(int(weight) for weight in weights) if size is None else size
        self._exhaustive = size is None
        self.config = config
        self.unique_identifiers = self._describe(size)
        members = ",\n".join(dataset.unique_description for dataset in datasets).replace("\n", "\n    ")
        self.unique_description, self.unique_description_hash = describe_uniquely(
            self.unique_identifiers, {"datasets": f"[\n    {members}\n]"}
        )
        self.built_anew_on_cache_miss = False
        self.dataset_index, self.dataset_sample_index = self._build_indices()
        self._require_samples()

    def _describe(self, size: int | None) -> OrderedDict[str, Any]:
        identifiers: OrderedDict[str, Any] = OrderedDict()
        identifiers["class"] = type(self).__name__
        identifiers["datasets"] = [dataset.unique_identifiers for dataset in self.datasets]
        identifiers["split"] = self.split.name
        identifiers["weights"] = self.weights
        identifiers["size"] = size
        return identifiers

    def _build_indices(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        cache = IndexCache(self.config.path_to_cache, name, self.unique_description)
        arrays, self.built_anew_on_cache_miss = cache.load_or_build(
            ("dataset_index", "dataset_sample_index"), self._check_indices, self._compute_indices
        )
        return arrays["dataset_index"], arrays["dataset_sample_index"]

    def _compute_indices(self) -> dict[str, numpy.ndarray]:
        weights, limits = numpy.array(self.weights), None
        if self._exhaustive:
            weights, limits = weights / weights.sum(), weights
        dataset_index, sample_index = build_blending_indices(weights, self.size, limits)
        return {"dataset_index": dataset_index, "dataset_sample_index": sample_index}

    def _check_indices(self, arrays: dict[str, numpy.ndarray]) -> str | None:
        problems = [
            check_array("dataset_index", arrays["dataset_index"], numpy.int16, (self.size,)),
            check_array("dataset_sample_index", arrays["dataset_sample_index"], numpy.int64, (self.size,)),
        ]
        found = [problem for problem in problems if problem]
        if found:
            return found[0]
        highest = int(arrays["dataset_index"].max(initial=0))
        if highest >= len(self.datasets) or arrays["dataset_index"].min(initial=0) < 0:
            return f"it names dataset {highest} of {len(self.datasets)}"
        return None

    def _require_samples(self) -> None:
        needed = numpy.bincount(self.dataset_index, minlength=len(self.datasets))
        for dataset, num_needed in zip(self.datasets, needed):
            if num_needed > len(dataset):
                raise IndexError(
                    f"the {self.split.name} blend of {self.size} samples takes {num_needed} from "
                    f"{getattr(dataset, 'dataset_path', None)}, which has {len(dataset)}: raise "
                    f"--mid-level-dataset-surplus (it is {self.config.mid_level_dataset_surplus})"
                )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int) -> dict[str, Any]:
        dataset_id = int(self.dataset_index[idx])
        return {"dataset_id": dataset_id, **self.datasets[dataset_id][int(self.dataset_sample_index[idx])]}

    def origin(self, idx: int) -> SampleOrigin:
        """What sample `idx` was made of."""
        dataset_id = int(self.dataset_index[idx])
        return self.datasets[dataset_id].origin(int(self.dataset_sample_index[idx])).within_blend(dataset_id)


def _check_mixture(datasets: list[MegatronDataset], weights: Sequence[int | float], size: int | None) -> None:
    if not 0 < len(datasets) <= _MAX_DATASETS:
        raise ValueError(f"a blend needs 1 to {_MAX_DATASETS} datasets, got {len(datasets)}")
    if len(weights) != len(datasets):
        raise ValueError(f"{len(datasets)} datasets but {len(weights)} weights")
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"every weight of a blend must be positive, got {weights}")
    splits = {dataset.index_split.name for dataset in datasets}
    if len(splits) > 1:
        raise ValueError(f"the datasets of a blend must be of one split, got {sorted(splits)}")
    if size is None and any(weight != int(weight) for weight in weights):
        raise ValueError(f"without a size the weights are numbers of samples, got {weights}")
