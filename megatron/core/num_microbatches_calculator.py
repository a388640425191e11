"""How many microbatches make up the global batch, constant or growing with the samples consumed."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)


class NumMicroBatchesCalculator(ABC):
    """The current batch: `num_micro_batches` of `micro_batch_size` samples on each data parallel rank."""

    num_micro_batches: int
    current_global_batch_size: int
    """Batch size asked for at this point of the run."""
    current_running_global_batch_size: int
    """Batch size that is run: rounded down to what fits the ranks, if that is allowed."""
    micro_batch_size: int

    def get(self) -> int:
        """Number of microbatches."""
        return self.num_micro_batches

    def get_current_global_batch_size(self) -> int:
        """Batch size asked for."""
        return self.current_global_batch_size

    def get_current_running_global_batch_size(self) -> int:
        """Batch size that is run."""
        return self.current_running_global_batch_size

    def get_micro_batch_size(self) -> int:
        """Samples in a microbatch."""
        return self.micro_batch_size

    @abstractmethod
    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Move to the batch size that holds after `consumed_samples`."""


class ConstantNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """The same batch all the time.

    Raises:
        ValueError: the global batch is not a multiple of microbatch × data parallel size (and may not be
            decreased).
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.current_global_batch_size = global_batch_size
        self.num_micro_batches, self.current_running_global_batch_size = _fit(
            global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed
        )

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Nothing changes."""


class RampupBatchsizeNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """Batch size grows from `start` to `global` in steps of `increment`, spread evenly over `ramup_samples` samples.

    Raises:
        ValueError: sizes that cannot be reached in whole increments.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
        start_global_batch_size: int,
        batch_size_increment: int,
        ramup_samples: int,
    ) -> None:
        if start_global_batch_size <= 0 or batch_size_increment <= 0 or ramup_samples < 0:
            raise ValueError(
                f"batch size ramp-up needs start > 0, increment > 0 and samples >= 0, not {start_global_batch_size}, "
                f"{batch_size_increment}, {ramup_samples}"
            )
        growth = global_batch_size - start_global_batch_size
        if growth < 0 or growth % batch_size_increment:
            raise ValueError(
                f"the global batch size ({global_batch_size}) must be the start ({start_global_batch_size}) plus a "
                f"multiple of the increment ({batch_size_increment})"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_parallel_size = data_parallel_size
        self.decrease_batch_size_if_needed = decrease_batch_size_if_needed
        self.rank = rank
        self.start_global_batch_size = start_global_batch_size
        self.batch_size_increment = batch_size_increment
        self.ramup_samples = ramup_samples
        steps = growth // batch_size_increment
        self.rampup_samples_per_increment = ramup_samples / steps if steps else 0.0
        self.current_global_batch_size = 0
        self.update(0, consistency_check=False)

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Move to the batch size that holds after `consumed_samples`.

        Raises:
            ValueError: with `consistency_check`, this size does not fit microbatch × data parallel size.
        """
        before = self.current_global_batch_size
        if consumed_samples > self.ramup_samples or not self.rampup_samples_per_increment:
            self.current_global_batch_size = self.global_batch_size
        else:
            steps = int(consumed_samples / self.rampup_samples_per_increment)
            grown = self.start_global_batch_size + steps * self.batch_size_increment
            self.current_global_batch_size = min(grown, self.global_batch_size)
        may_decrease = self.decrease_batch_size_if_needed
        per_step = self.micro_batch_size * self.data_parallel_size
        if consistency_check or may_decrease or self.current_global_batch_size % per_step == 0:
            self.num_micro_batches, self.current_running_global_batch_size = _fit(
                self.current_global_batch_size, self.micro_batch_size, self.data_parallel_size, may_decrease
            )
        else:
            self.num_micro_batches = self.current_global_batch_size // per_step
            self.current_running_global_batch_size = self.current_global_batch_size
        if verbose and before != self.current_global_batch_size:
            log_single_rank(
                logger,
                logging.INFO,
                f"ramping up batch size from {before} to {self.current_global_batch_size}",
            )


def _fit(global_batch_size: int, micro: int, data_parallel_size: int, may_decrease: bool) -> tuple[int, int]:
    """(number of microbatches, batch size run)."""
    per_step = micro * data_parallel_size
    running = global_batch_size // per_step * per_step
    if running == 0 or (running != global_batch_size and not may_decrease):
        raise ValueError(
            f"global batch size ({global_batch_size}) is not a multiple of micro batch size ({micro}) × data parallel "
            f"size ({data_parallel_size}) = {per_step}; nearest multiples: {running} and {running + per_step}"
            + ("" if may_decrease else " (or pass --decrease-batch-size-if-needed)")
        )
    return running // per_step, running


def build_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> NumMicroBatchesCalculator:
    """A calculator as a value; `rampup_batch_size` is [start, increment, samples] or None."""
    common = (global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank)
    if rampup_batch_size is None:
        return ConstantNumMicroBatchesCalculator(*common)
    if len(rampup_batch_size) != 3:
        raise ValueError(f"rampup_batch_size is [start, increment, samples], not {rampup_batch_size}")
    return RampupBatchsizeNumMicroBatchesCalculator(*common, *map(int, rampup_batch_size))


_calculator: NumMicroBatchesCalculator | None = None


def init_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Set the process-wide calculator up.

    Raises:
        RuntimeError: there is one already.
    """
    if _calculator is not None:
        raise RuntimeError("the microbatch calculator exists already; use reconfigure_num_microbatches_calculator")
    reconfigure_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )


def reconfigure_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Replace the process-wide calculator."""
    global _calculator
    _calculator = build_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )


def destroy_num_microbatches_calculator() -> None:
    """Forget the process-wide calculator."""
    global _calculator
    _calculator = None


unset_num_microbatches_calculator = destroy_num_microbatches_calculator


def _current() -> NumMicroBatchesCalculator:
    if _calculator is None:
        raise RuntimeError("call init_num_microbatches_calculator(...) first")
    return _calculator


def get_num_microbatches() -> int:
    """Number of microbatches of the current batch."""
    return _current().get()


def get_current_global_batch_size() -> int:
    """Batch size asked for at this point of the run."""
    return _current().get_current_global_batch_size()


def get_current_running_global_batch_size() -> int:
    """Batch size that is run."""
    return _current().get_current_running_global_batch_size()


def get_micro_batch_size() -> int:
    """Samples in a microbatch."""
    return _current().get_micro_batch_size()


def update_num_microbatches(consumed_samples: int, consistency_check: bool = True, verbose: bool = False) -> None:
    """Move the process-wide calculator to the batch size that holds after `consumed_samples`."""
    _current().update(consumed_samples, consistency_check, verbose)
