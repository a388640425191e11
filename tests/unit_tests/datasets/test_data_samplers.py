import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import build_num_microbatches_calculator
from megatron.training import setup
from megatron.training.datasets.data_samplers import (
    MegatronPretrainingRandomSampler,
    MegatronPretrainingSampler,
    build_pretraining_data_loader,
)
from megatron.training.global_vars import set_args
from tests.unit_tests.datasets.data_files import gpt_config, random_documents, write_dataset
from tests.worker_pool import run_ranks


def global_batches(kind: type, total: int, consumed: int, micro: int, ranks: int, size: int, **options) -> list:
    """Sets of samples of each global batch of `size`."""
    given = (range(total),) if kind is MegatronPretrainingRandomSampler else ()
    samplers = [kind(*given, total, consumed, micro, rank, ranks, **options) for rank in range(ranks)]
    steps = list(zip(*samplers))
    per_batch = size // (micro * ranks)
    groups = [steps[i : i + per_batch] for i in range(0, len(steps) - per_batch + 1, per_batch)]
    return [sorted(sample for step in group for part in step for sample in part) for group in groups]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (1, 4), (2, 2), (1, 2), (8, 1)])
def test_single_gives_the_same_global_batches_for_every_layout(micro: int, ranks: int) -> None:
    batches = global_batches(MegatronPretrainingSampler, 43, 8, micro, ranks, 8)
    assert batches == [list(range(begin, begin + 8)) for begin in range(8, 40, 8)]


def test_single_deals_out_microbatches_by_rank() -> None:
    parts = [list(MegatronPretrainingSampler(14, 0, 2, rank, 3)) for rank in range(3)]
    assert parts == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    kept = [list(MegatronPretrainingSampler(14, 0, 2, rank, 3, drop_last=False))[-1] for rank in range(3)]
    assert kept == [[12, 13], [], []]


@pytest.mark.parametrize("data_sharding", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_cyclic_follows_its_rule(data_sharding: bool, ranks: int) -> None:
    total, micro = 47, 2
    stride = micro * ranks
    active = total - total % stride
    for rank in range(ranks):
        for consumed in (0, stride, active, active + 3 * stride):
            sampler = MegatronPretrainingRandomSampler(
                None, total, consumed, micro, rank, ranks, data_sharding=data_sharding
            )
            found = [sample for batch in sampler for sample in batch]
            generator = torch.Generator().manual_seed(consumed // active)
            skipped = consumed % active
            if data_sharding:
                bucket = total // stride * micro
                order = (torch.randperm(bucket, generator=generator) + rank * bucket)[skipped // ranks :]
            else:
                order = torch.randperm(total // micro * micro, generator=generator)[skipped:][rank::ranks]
            num_left = (active - skipped) // ranks
            assert found == order.tolist()[:num_left] and len(found) == num_left
            assert sampler.consumed_samples == consumed + active - skipped


@pytest.mark.parametrize("data_sharding", [True, False])
@pytest.mark.parametrize(("total", "rank"), [(20, 1), (23, 0), (23, 1)])
def test_cyclic_resumes_anywhere(data_sharding: bool, total: int, rank: int) -> None:
    def batches(consumed: int, count: int) -> list:
        sampler = MegatronPretrainingRandomSampler(None, total, consumed, 2, rank, 2, data_sharding)
        endless = itertools.chain.from_iterable(itertools.repeat(sampler))
        return [next(endless) for _ in range(count)]

    whole = batches(0, 12)
    for done in range(12):
        assert batches(done * 4, 12 - done) == whole[done:]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="8 consumed of 8"):
        MegatronPretrainingSampler(8, 8, 1, 0, 1)
    with pytest.raises(ValueError, match="no samples"):
        MegatronPretrainingSampler(0, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="rank 2 is not below the size 2"):
        MegatronPretrainingSampler(8, 0, 1, 2, 2)
    with pytest.raises(ValueError, match="3 samples do not fill a micro-batch of 2 on 2"):
        MegatronPretrainingRandomSampler(None, 3, 0, 2, 0, 2)
    with pytest.raises(ValueError, match="no whole number of steps"):
        list(MegatronPretrainingRandomSampler(None, 30, 3, 2, 0, 2))
    with pytest.raises(ValueError, match="single, cyclic or external"):
        build_pretraining_data_loader(
            [1], 0, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1, dataloader_type="x"
        )


def test_no_dataset_and_external_loader() -> None:
    sizes = {"micro_batch_size": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    assert build_pretraining_data_loader(None, 0, **sizes) is None
    mine = object()
    assert build_pretraining_data_loader(mine, 0, **sizes, dataloader_type="external") is mine


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    prefix = write_dataset(tmp_path / "d", random_documents(80))
    config = gpt_config(blend=([prefix], None), split="1,0,0", create_attention_mask=False)
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    return GPTDataset(low_level, prefix, numpy.arange(80), 64, Split.train, config)


def hashes_of_global_batches(
    dataset: GPTDataset, consumed: int, micro: int, ranks: int, num_workers: int = 0
) -> list[str]:
    loaders = [
        build_pretraining_data_loader(
            dataset,
            consumed,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            num_workers=num_workers,
        )
        for rank in range(ranks)
    ]
    steps = [torch.cat([part["tokens"] for part in step]) for step in zip(*loaders)]
    samples = torch.cat(steps)
    samples = samples[: len(samples) // 8 * 8].view(-1, 8, samples.shape[-1])
    return [hashlib.sha256(batch.numpy().tobytes()).hexdigest() for batch in samples]


def test_loaders_give_the_same_tokens_for_every_layout_and_resume(dataset: GPTDataset) -> None:
    state = torch.get_rng_state()
    whole = hashes_of_global_batches(dataset, 0, 1, 1)
    assert len(set(whole)) == len(whole) >= 8
    for micro, ranks in ((4, 1), (1, 4), (2, 2)):
        assert hashes_of_global_batches(dataset, 0, micro, ranks) == whole
    assert hashes_of_global_batches(dataset, 24, 2, 2) == whole[3:]
    assert torch.equal(torch.get_rng_state(), state)


def test_worker_processes_change_nothing(dataset: GPTDataset) -> None:
    assert hashes_of_global_batches(dataset, 8, 4, 1, num_workers=2) == hashes_of_global_batches(dataset, 8, 4, 1)


def iterate_external(dataset: Any) -> list:
    parallel_state.initialize_model_parallel()
    set_args(SimpleNamespace(dataloader_type="external"))
    return list(setup._iterate(dataset, 8))


def test_external_loaders_are_read_as_they_are() -> None:
    assert run_ranks(1, iterate_external, [{"tokens": 1}, {"tokens": 2}]) == [[{"tokens": 1}, {"tokens": 2}]]
    with pytest.raises(AssertionError, match="external is for programs .* this one returns a TensorDataset"):
        run_ranks(1, iterate_external, torch.utils.data.TensorDataset(torch.ones(3)))


# -- stopped and resumed at every step ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> BlendedDataset:
    """Samples of two sets of documents, several times each."""
    folder = tmp_path_factory.mktemp("blend")
    prefixes = [write_dataset(folder / name, random_documents(80, seed=i)) for i, name in enumerate("ab")]
    config = gpt_config(blend=(prefixes, [0.3, 0.7]), split="1,0,0", create_attention_mask=False)
    return BlendedMegatronDatasetBuilder(GPTDataset, [256, 0, 0], lambda: True, config).build()[0]


def ramp_up(micro: int, ranks: int, consumed: int, num_samples: int) -> list[int]:
    """Sizes of the global batches from `consumed` samples on: 16, then 16 more after every 48 samples, up to 48."""
    sizes = []
    calculator = build_num_microbatches_calculator(0, [16, 16, 96], 48, micro, ranks)
    while consumed < num_samples:
        calculator.update(consumed, consistency_check=True)
        sizes.append(calculator.get() * micro * ranks)
        consumed += sizes[-1]
    return sizes


def batch_hashes(dataset: BlendedDataset, micro: int, ranks: int, consumed: int, num_samples: int) -> list[str]:
    """What all ranks read together, of each global batch of a run that continues after `consumed` samples."""
    loaders = [
        iter(
            build_pretraining_data_loader(
                dataset, consumed, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=ranks
            )
        )
        for rank in range(ranks)
    ]
    hashes = []
    for size in ramp_up(micro, ranks, consumed, num_samples):
        parts = [next(loader) for _ in range(size // (micro * ranks)) for loader in loaders]
        read = [torch.cat([part[name] for part in parts]).numpy().tobytes() for name in ("tokens", "labels")]
        hashes.append(hashlib.sha256(b"".join(read)).hexdigest())
    return hashes


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_batches_stopped_at_any_step(blend: BlendedDataset, micro: int, ranks: int) -> None:
    """A run of one rank without a stop is the measure; whoever continues it, at whatever step, reads its batches."""
    num_samples = 256
    sizes = ramp_up(1, 1, 0, num_samples)
    assert sizes == [16, 16, 16, 32, 32, 48, 48, 48] and len(blend) >= num_samples
    whole = batch_hashes(blend, 1, 1, 0, num_samples)
    assert len(set(whole)) == len(sizes)
    for step, consumed in enumerate(itertools.accumulate(sizes[:-1], initial=0)):
        assert batch_hashes(blend, micro, ranks, consumed, num_samples) == whole[step:]
