import itertools

import pytest

from megatron.core.distributed.bucket_layout import lay_out_buffer, round_up


def test_published_example() -> None:
    layout = lay_out_buffer([100, 70, 200], num_shards=4)
    assert layout.spans == ((384, 484), (256, 326), (0, 200))
    (bucket,) = layout.buckets
    assert (bucket.start, bucket.end, bucket.numel_unpadded) == (0, 512, 484)
    assert [bucket.shard(rank, 4) for rank in range(4)] == [(0, 128), (128, 256), (256, 384), (384, 512)]


def test_without_sharding_everything_is_dense() -> None:
    layout = lay_out_buffer([100, 70, 200], bucket_size=250)
    assert layout.spans == ((270, 370), (200, 270), (0, 200))
    assert [(b.start, b.end, b.param_indices) for b in layout.buckets] == [(0, 270, (2, 1)), (270, 370, (0,))]
    assert layout.numel == layout.numel_unpadded == 370


def test_tied_embeddings_lie_at_the_same_elements_on_every_stage() -> None:
    """First stage: embedding first; last stage: a copy of it among other weights. Its owners must agree."""
    first = lay_out_buffer([1000, 30, 500], num_shards=2, isolated={0})
    last = lay_out_buffer([30, 500, 77, 1000], num_shards=2, isolated={3})
    for layout, index in ((first, 0), (last, 3)):
        (bucket,) = [bucket for bucket in layout.buckets if index in bucket.param_indices]
        assert bucket.param_indices == (index,)
        assert layout.spans[index][0] == bucket.start and bucket.end - bucket.start == 1024
    assert [len(layout.buckets) for layout in (first, last)] == [2, 2]
    assert first.buckets[0].numel_unpadded == 576  # 500, gap of 12, 30, and the gap in front of the embedding


def test_bus_bandwidth_padding() -> None:
    layout = lay_out_buffer([10], num_shards=6, pad_for_bus_bandwidth=True)
    assert layout.numel == 3 * 2**16 and layout.numel_unpadded == 10


def test_isolation_only_matters_when_sharded() -> None:
    assert len(lay_out_buffer([5, 5, 5], isolated={1}).buckets) == 1


@pytest.mark.parametrize("num_shards", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("bucket_size", [None, 1, 70, 130])
def test_invariants_of_all_small_layouts(num_shards: int | None, bucket_size: int | None) -> None:
    for count in range(1, 5):
        for numels in itertools.product([1, 64, 100], repeat=count):
            for isolated in [set(), {0}, {count - 1}]:
                check_invariants(numels, bucket_size, num_shards, isolated)


def check_invariants(numels: tuple[int, ...], bucket_size: int | None, num_shards: int | None, isolated: set) -> None:
    layout = lay_out_buffer(numels, bucket_size=bucket_size, num_shards=num_shards, isolated=isolated)
    # every parameter lies once in one bucket, later parameters first, and nothing overlaps
    assert [i for bucket in layout.buckets for i in bucket.param_indices] == list(reversed(range(len(numels))))
    spans = [layout.spans[i] for i in reversed(range(len(numels)))]
    assert all(end - start == numels[i] for i, (start, end) in enumerate(layout.spans))
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    # buckets are adjacent and hold their parameters
    assert layout.buckets[0].start == 0
    assert all(left.end == right.start for left, right in itertools.pairwise(layout.buckets))
    for bucket in layout.buckets:
        last = layout.spans[bucket.param_indices[-1]][1]
        assert bucket.start <= layout.spans[bucket.param_indices[0]][0]
        # a bucket that a tied embedding cuts off includes the alignment gap in front of that embedding
        assert last - bucket.start <= bucket.numel_unpadded <= round_up(last - bucket.start, 64)
        assert bucket.numel_unpadded <= bucket.end - bucket.start
        if num_shards is None:
            assert bucket.end == last == bucket.start + bucket.numel_unpadded
        else:
            assert (bucket.end - bucket.start) % num_shards == 0 == (bucket.end - bucket.start) % 128
            assert all(layout.spans[i][0] % 64 == 0 for i in bucket.param_indices)
            shards = [bucket.shard(rank, num_shards) for rank in range(num_shards)]
            assert [start for start, _ in shards] + [bucket.end] == [bucket.start] + [end for _, end in shards]
            assert not isolated & set(bucket.param_indices) or len(bucket.param_indices) == 1
        if bucket_size is not None and bucket is not layout.buckets[-1]:
            full = bucket.numel_unpadded >= bucket_size
            cut_for_isolation = num_shards is not None and any(
                i in isolated for b in layout.buckets for i in b.param_indices
            )
            assert full or cut_for_isolation
    if bucket_size is None and (num_shards is None or not isolated):
        assert len(layout.buckets) == 1
