"""A batch that one rank reads reaches its tensor parallel group, and only that."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import broadcast_data
from tests.worker_pool import run_ranks


def batch(number: int) -> dict[str, Tensor]:
    """What the first rank of tensor parallel group `number` reads."""
    generator = torch.Generator().manual_seed(number)
    return {
        "tokens": torch.randint(0, 1000, (2, 7), generator=generator),
        "labels": torch.randint(0, 1000, (7, 2), generator=generator).T,  # not contiguous
        "scalar": torch.tensor(number),
        "deep": torch.randint(0, 9, (1, 2, 1, 3, 2), generator=generator),
        "unused": torch.rand(3),
    }


KEYS = ["tokens", "deep", "labels", "scalar"]


def check_broadcast(tp: int, others_have_data: bool) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    number = dist.get_rank() // tp
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    data = batch(number) if reads else batch(99) if others_have_data else None
    received = broadcast_data(KEYS, data, torch.int64)
    assert list(received) == KEYS
    torch.testing.assert_close(received, {key: batch(number)[key] for key in KEYS}, rtol=0, atol=0)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_the_first_rank_of_each_group_hands_its_batch_on(world: int, tp: int) -> None:
    run_ranks(world, check_broadcast, tp, False)


def test_what_other_ranks_have_does_not_count() -> None:
    run_ranks(2, check_broadcast, 2, True)


def check_other_group_and_type() -> None:
    parallel_state.initialize_model_parallel()
    mask = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    data = {"loss_mask": mask} if dist.get_rank() == 0 else None
    group = parallel_state.get_data_parallel_group()
    assert torch.equal(broadcast_data(["loss_mask"], data, torch.float32, tp_group=group)["loss_mask"], mask)


def test_other_groups_and_types() -> None:
    run_ranks(2, check_other_group_and_type)


def check_refused(data: dict[str, Tensor], found: str) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    reads = dist.get_rank() == 0
    message = "'bad' must be torch.int64 with at most 5 dimensions" + (found if reads else "$")
    with pytest.raises(ValueError, match=message):
        broadcast_data(["good", "bad"], data if reads else None, torch.int64)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (torch.zeros(2, 3), ", not torch.float32 with 2"),
        (torch.zeros([1] * 6, dtype=torch.int64), ", not torch.int64 with 6"),
    ],
)
def test_wrong_data_is_refused_on_every_rank(world: int, bad: Tensor, found: str) -> None:
    """The ranks that read nothing must not be left waiting for the values."""
    run_ranks(world, check_refused, {"good": torch.zeros(2, dtype=torch.int64), "bad": bad}, found)
