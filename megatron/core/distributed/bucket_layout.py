"""Where each parameter lies in a flat data-parallel buffer, and where the buffer is cut into buckets.

Pure arithmetic, so that every rank (and a checkpoint reader) derives the same layout from the sizes alone.
The element order of `distrib_optim.pt` is defined by it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

PARAM_ALIGNMENT = 64
"""Elements; a sharded buffer starts every parameter at a multiple of it."""
SHARD_ALIGNMENT = 128
"""Elements; the padded size of a sharded bucket is a multiple of it, which keeps 16-bit ranges aligned."""
BUSBW_ALIGNMENT = 2**16
"""Elements; NCCL reaches its best bus bandwidth with message sizes divisible by it."""


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: elements `[start, end)` of the buffer, the last of which are padding."""

    start: int
    end: int
    numel_unpadded: int
    param_indices: tuple[int, ...]
    """Positions in the given parameter list, in the order in which they lie in the buffer."""

    def shard(self, rank: int, num_shards: int) -> tuple[int, int]:
        """Elements of the buffer that `rank` owns of this bucket, irrespective of parameter borders."""
        shard_numel, remainder = divmod(self.end - self.start, num_shards)
        assert remainder == 0, "a sharded bucket is padded to a multiple of the number of shards"
        return self.start + rank * shard_numel, self.start + (rank + 1) * shard_numel


@dataclass(frozen=True)
class BufferLayout:
    """A whole buffer: `spans[i]` are the elements `[start, end)` of the i-th given parameter."""

    spans: tuple[tuple[int, int], ...]
    buckets: tuple[BucketLayout, ...]

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.buckets[-1].end if self.buckets else 0

    @property
    def numel_unpadded(self) -> int:
        """Elements without the padding at the ends of buckets; gaps between parameters count."""
        return sum(bucket.numel_unpadded for bucket in self.buckets)


def lay_out_buffer(
    numels: Sequence[int],
    *,
    bucket_size: int | None = None,
    num_shards: int | None = None,
    isolated: Collection[int] = (),
    pad_for_bus_bandwidth: bool = False,
) -> BufferLayout:
    """Layout of parameters with `numels` elements, given in the order of the model's forward pass.

    Parameters are placed in reverse, the order in which their gradients become ready. A bucket closes once it
    holds `bucket_size` elements (`None`: one bucket).

    Args:
        num_shards: ranks among which every bucket is cut evenly (distributed optimizer), which asks for
            alignment of parameters and padding of buckets; `None`: buckets are not sharded and everything is
            dense.
        isolated: indices of parameters that get a bucket of their own when sharded. Tied embeddings need it:
            the stages that hold the copies must give the same elements to the same rank.

    >>> layout = lay_out_buffer([100, 70, 200], num_shards=4)
    >>> layout.spans, layout.numel, layout.numel_unpadded
    (((384, 484), (256, 326), (0, 200)), 512, 484)
    """
    sharded = num_shards is not None
    bucket_alignment = math.lcm(num_shards, SHARD_ALIGNMENT) if num_shards else 1
    if sharded and pad_for_bus_bandwidth:
        bucket_alignment = math.lcm(bucket_alignment, BUSBW_ALIGNMENT)

    spans: list[tuple[int, int]] = [(0, 0)] * len(numels)
    buckets: list[BucketLayout] = []
    members: list[int] = []
    start = position = 0

    def close_bucket() -> None:
        nonlocal start, position, members
        end = round_up(position, bucket_alignment)
        buckets.append(BucketLayout(start, end, position - start, tuple(members)))
        start, position, members = end, end, []

    for index in reversed(range(len(numels))):
        alone = sharded and index in isolated
        if sharded:
            position = round_up(position, PARAM_ALIGNMENT)
        if alone and members:
            close_bucket()
        spans[index] = (position, position + numels[index])
        position += numels[index]
        members.append(index)
        if alone or (bucket_size is not None and position - start >= bucket_size):
            close_bucket()
    if members:
        close_bucket()
    return BufferLayout(tuple(spans), tuple(buckets))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
