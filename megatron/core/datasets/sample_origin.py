"""Where a sample comes from: which parts of which documents, in which pass over the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy


@dataclass(frozen=True)
class DocumentPart:
    """A piece of one document."""

    document: int
    """Number of the document in its dataset, from 0."""
    begin: int
    end: int
    """From `begin` up to, not including, `end`, in the unit of the sample's origin."""
    epoch: int | None
    """How often the document stands earlier in the order of reading; None: not recorded."""


@dataclass(frozen=True)
class SampleOrigin:
    """A sample as what was read for it."""

    dataset_path: str | None
    sample: int
    """Number of the sample in the order in which its dataset gives samples out."""
    parts: tuple[DocumentPart, ...]
    unit: str
    """What the bounds of parts count: tokens or sentences."""
    tokens: numpy.ndarray
    """The ids read, before any is masked or replaced."""
    dataset_id: int | None = None
    """Number of the dataset in a blend, None outside of one."""

    def within_blend(self, dataset_id: int) -> SampleOrigin:
        """The same, as part of a blend."""
        return replace(self, dataset_id=dataset_id)
