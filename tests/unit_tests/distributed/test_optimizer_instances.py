"""Several instances of the sharded optimizer state: each instance holds all of it, gradients are summed across."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from tests.unit_tests.distributed.stack import Stack, backward, optimizer_of, train, wrap
from tests.worker_pool import RankFailure, run_ranks


class ShardedStack(Stack):
    """Can be saved."""

    def sharded_state_dict(self, prefix: str = "", *unused: Any) -> dict[str, ShardedTensor]:
        replica = (0, 0, parallel_state.get_data_parallel_rank())
        return {
            prefix + name: ShardedTensor.from_rank_offsets(prefix + name, param, replica_id=replica)
            for name, param in self.named_parameters()
        }


def chunk_and_optimizer(instances: int, **ddp: Any) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(num_distributed_optimizer_instances=instances)
    settings = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": instances, **ddp}
    chunk = wrap(ShardedStack(settings.pop("dtype", torch.float32)), **settings)
    return chunk, optimizer_of([chunk], clip_grad=1.0)


@pytest.mark.parametrize("instances", [2, 4])
@pytest.mark.parametrize("average", [False, True])
def test_owned_gradients_are_the_mean_over_all_replicas(instances: int, average: bool) -> None:
    run_ranks(4, check_gradients, instances, average)


def check_gradients(instances: int, average: bool) -> None:
    chunk, _ = chunk_and_optimizer(instances, average_in_collective=average, overlap_grad_reduce=True)
    plain = wrap(Stack())
    (buffer,) = chunk.param_and_grad_buffers
    for step in range(3):  # the first one launches at its end
        for one in (plain, chunk):
            backward(one, step)
            one.finish_grad_sync()
        expected = torch.zeros(buffer.numel)
        for (start, end), param in zip(buffer.layout.spans, plain.module.parameters()):
            expected[start:end] = param.main_grad.flatten()
        size = buffer.data_parallel_group.size()
        assert size == 4 // instances
        for bucket in buffer.buckets:
            start, end = bucket.layout.shard(buffer.data_parallel_group.rank(), size)
            torch.testing.assert_close(buffer.grad_data[start:end], expected[start:end], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", [False, True])
def test_training_equals_one_instance(overlap: bool, dtype: torch.dtype) -> None:
    run_ranks(4, check_training, overlap, dtype)


def check_training(overlap: bool, dtype: torch.dtype) -> None:
    results = []
    settings: dict[str, Any] = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap, "dtype": dtype}
    settings["grad_reduce_in_fp32"] = True
    for instances in (1, 2, 4):
        chunk, optimizer = chunk_and_optimizer(instances, **settings)
        shard = sum(main.numel() for main in optimizer.get_parameters())
        train(chunk, optimizer, range(4))
        results.append((chunk.state_dict(), optimizer.get_grad_norm(), shard))
    one, *others = results
    for weights, norm, _ in others:
        torch.testing.assert_close(weights, one[0], rtol=1e-5, atol=1e-6)
        assert norm == pytest.approx(one[1], rel=1e-5)
    assert others[-1][2] == sum(w.numel() for w in one[0].values())  # instances of one rank: not sharded at all


@pytest.mark.parametrize(
    "kind", ["fully_sharded_model_space", "dp_zero_gather_scatter", "fully_sharded_bucket_space", "file"]
)
def test_resume_is_bit_exact(kind: str, tmp_path: Path) -> None:
    run_ranks(4, check_resume, kind, str(tmp_path))


def check_resume(kind: str, folder: str) -> None:
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    chunk, optimizer = chunk_and_optimizer(2, **overlapped)
    train(chunk, optimizer, range(2))
    save(chunk, optimizer, kind, folder)
    train(chunk, optimizer, range(2, 4))
    expected = {name: value.clone() for name, value in chunk.state_dict().items()}
    chunk, optimizer = chunk_and_optimizer(2, **overlapped)
    for param in chunk.parameters():
        param.data.zero_()
    load(chunk, optimizer, kind, folder)
    train(chunk, optimizer, range(2, 4))
    torch.testing.assert_close(chunk.state_dict(), expected, rtol=0, atol=0)


def test_state_moves_between_numbers_of_instances(tmp_path: Path) -> None:
    run_ranks(4, check_other_number, str(tmp_path))


def check_other_number(folder: str) -> None:
    kind = "fully_sharded_model_space"
    chunk, optimizer = chunk_and_optimizer(2)
    train(chunk, optimizer, range(2))
    save(chunk, optimizer, kind, folder)
    train(chunk, optimizer, range(2, 4))
    expected = {name: value.clone() for name, value in chunk.state_dict().items()}
    for instances in (1, 4):
        chunk, optimizer = chunk_and_optimizer(instances)
        load(chunk, optimizer, kind, folder)
        train(chunk, optimizer, range(2, 4))
        torch.testing.assert_close(chunk.state_dict(), expected, rtol=1e-5, atol=1e-6)


def request(chunk: Any, optimizer: Any, kind: str, is_loading: bool) -> dict[str, Any]:
    model: dict[str, Tensor] = chunk.sharded_state_dict()
    if kind == "file":
        return {"model": model}
    metadata = {"distrib_optim_sharding_type": kind}
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def save(chunk: Any, optimizer: Any, kind: str, folder: str) -> None:
    dist_checkpointing.save(request(chunk, optimizer, kind, is_loading=False), folder)
    if kind == "file":
        optimizer.save_parameter_state(f"{folder}/distrib_optim.pt")
        torch.save(optimizer.state_dict(), f"{folder}/groups_{torch.distributed.get_rank()}.pt")
        torch.distributed.barrier()


def load(chunk: Any, optimizer: Any, kind: str, folder: str) -> None:
    loaded = dist_checkpointing.load(request(chunk, optimizer, kind, is_loading=True), folder)
    chunk.load_state_dict(loaded["model"])
    if kind == "file":
        optimizer.load_state_dict(torch.load(f"{folder}/groups_{torch.distributed.get_rank()}.pt", weights_only=True))
        optimizer.load_parameter_state(f"{folder}/distrib_optim.pt")
    else:
        optimizer.load_state_dict(loaded["optimizer"])


def test_settings_and_process_groups_must_agree() -> None:
    with pytest.raises(
        RankFailure, match=r"num_distributed_optimizer_instances \(2\) must be that of the process groups \(1\)"
    ):
        run_ranks(2, disagree)


def disagree() -> None:
    parallel_state.initialize_model_parallel()
    wrap(Stack(), use_distributed_optimizer=True, num_distributed_optimizer_instances=2)
