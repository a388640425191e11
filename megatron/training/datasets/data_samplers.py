"""Which samples each data-parallel rank reads in which order: a function of the samples consumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class MegatronPretrainingSampler:
    """Samples in order, from `consumed_samples` on: each step takes the next micro-batch for every rank in
    turn.

    The samples of a global batch depend neither on the number of ranks nor on the micro-batch size.

    Args:
        total_samples: size of the dataset.
        drop_last: leave out the samples at the end that do not fill a micro-batch on every rank.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
    ) -> None:
        _check_sizes(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples >= total_samples:
            raise ValueError(f"all samples are used: {consumed_samples} consumed of {total_samples}")
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.data_parallel_size
        first = self.data_parallel_rank * self.micro_batch_size
        for begin in range(self.consumed_samples, self.total_samples, stride):
            is_full = begin + stride <= self.total_samples
            if is_full or not self.drop_last:
                start = begin + first
                yield list(range(start, min(start + self.micro_batch_size, self.total_samples)))


class MegatronPretrainingRandomSampler:
    """Samples of one epoch in random order, continued after `consumed_samples`; iterate again for the next
    epoch.

    The order is drawn anew in each epoch, with the epoch's number as seed.

    Args:
        data_sharding: each rank shuffles its own part of the dataset; otherwise the ranks share one order.
    """

    def __init__(
        self,
        dataset: Any,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_sharding: bool = True,
    ) -> None:
        _check_sizes(total_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        self.dataset = dataset
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.data_sharding = data_sharding
        self.stride = micro_batch_size * data_parallel_size
        if total_samples < self.stride:
            raise ValueError(
                f"{total_samples} samples do not fill a micro-batch of {micro_batch_size} on "
                f"{data_parallel_size} data-parallel ranks"
            )

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        active_samples = self.total_samples - self.total_samples % self.stride
        epoch, consumed = divmod(self.consumed_samples, active_samples)
        if consumed % self.stride:
            raise ValueError(
                f"{self.consumed_samples} consumed samples are no whole number of steps of {self.stride} samples"
            )
        # as many steps on every rank, also where the shared order does not divide evenly
        order = self._order(epoch, consumed)[: (active_samples - consumed) // self.data_parallel_size]
        for begin in range(0, len(order), self.micro_batch_size):
            self.consumed_samples += self.stride
            yield order[begin : begin + self.micro_batch_size]

    def _order(self, epoch: int, consumed: int) -> list[int]:
        """What this rank still has to read in the epoch."""
        generator = torch.Generator()
        generator.manual_seed(epoch)
        if self.data_sharding:
            bucket_size = self.total_samples // self.stride * self.micro_batch_size
            start = self.data_parallel_rank * bucket_size
            order = torch.randperm(bucket_size, generator=generator) + start
            return order[consumed // self.data_parallel_size :].tolist()
        shared_size = self.total_samples // self.micro_batch_size * self.micro_batch_size
        order = torch.randperm(shared_size, generator=generator)
        return order[consumed:][self.data_parallel_rank :: self.data_parallel_size].tolist()


def _check_sizes(total_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int) -> None:
    if total_samples <= 0:
        raise ValueError(f"there are no samples: the dataset has {total_samples}")
    if micro_batch_size <= 0:
        raise ValueError(f"micro_batch_size must be positive, got {micro_batch_size}")
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data-parallel rank {data_parallel_rank} is not below the size {data_parallel_size}")


def build_sampler(
    dataset: Any,
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    dataloader_type: str,
    data_sharding: bool,
) -> MegatronPretrainingSampler | MegatronPretrainingRandomSampler:
    """The order in which one rank reads a dataset from `consumed_samples` on, as lists of a micro-batch each."""
    sizes = {
        "total_samples": len(dataset),
        "consumed_samples": consumed_samples,
        "micro_batch_size": micro_batch_size,
        "data_parallel_rank": data_parallel_rank,
        "data_parallel_size": data_parallel_size,
    }
    match dataloader_type:
        case "single":
            return MegatronPretrainingSampler(**sizes)
        case "cyclic":
            return MegatronPretrainingRandomSampler(dataset, **sizes, data_sharding=data_sharding)
        case _:
            raise ValueError(f"dataloader_type must be single, cyclic or external, got {dataloader_type}")


def build_pretraining_data_loader(
    dataset: Any,
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    dataloader_type: str = "single",
    num_workers: int = 0,
    data_sharding: bool = True,
    seed: int = 0,
) -> Any:
    """Batches of one rank from `consumed_samples` on; None without a dataset.

    Args:
        dataloader_type: "single" reads in the dataset's own order once, "cyclic" in a random order by epochs
            (iterate again for each), "external" returns `dataset`, which is a loader already.
        num_workers: processes that read ahead; the batches are the same for any number.
        data_sharding: for "cyclic": each rank reads its own part of the dataset.
        seed: for random numbers drawn in worker processes. The global generator is left alone, so that a
            resumed run continues with the same random numbers.
    """
    if dataset is None or dataloader_type == "external":
        return dataset
    sampler = build_sampler(
        dataset,
        consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        dataloader_type=dataloader_type,
        data_sharding=data_sharding,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
