"""What changes while a run goes on, apart from the model and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Progress of a run. A checkpoint holds it, and a resumed run continues from it."""

    iteration: int = 0
    """Completed iterations, those whose update was skipped included."""
    consumed_train_samples: int = 0
    """Samples that training has taken from the data, skipped ones included."""
    skipped_train_samples: int = 0
    """Samples of these that no update has used, because the batch size did not divide over the ranks."""
    consumed_valid_samples: int = 0
    """Samples that validations have taken from their data."""
    num_floating_point_operations_so_far: float = 0.0
    """Operations of the model, forward and backward, since the first iteration of the run."""
    data_position: Any = field(default=None, compare=False, repr=False)
    """Where a data iterator with a state of its own stood when it was saved, until that iterator is built."""
