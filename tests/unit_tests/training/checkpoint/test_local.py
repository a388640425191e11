"""Checkpoints on the nodes' own disks: every rank puts its state together from what is left."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.training.checkpoint.local import local_root, visible_shares
from megatron.training.checkpoint.replication import replication_groups
from tests.unit_tests.training.checkpoint.tiny_run import Plan, TinyRun
from tests.worker_pool import run_ranks


def flags(folder: str, **more: Any) -> dict[str, Any]:
    """Every rank is a node with a disk of its own."""
    disk = f"{folder}/node{dist.get_rank()}"
    return {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": disk, **more}


def save_then_lose(
    plan: Plan, folder: str, lost: list[int], more: dict[str, Any]
) -> tuple[int, list[Any], list[Any], str]:
    """(iteration resumed from, results after it, results of the uninterrupted run, output)."""
    run = TinyRun(plan)
    run.train(1)
    run.save(folder)  # persistent, at iteration 1
    run.train(1)
    run.save(folder, non_persistent=True, **flags(folder, **more))
    run.checkpoints.finish(blocking=True)
    expected = run.train(2)
    dist.barrier()
    if dist.get_rank() in lost:
        shutil.rmtree(f"{folder}/node{dist.get_rank()}")
    dist.barrier()
    again = TinyRun(plan, seed=1000)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        again.load(folder, **flags(folder, **more))
    started = again.state.iteration
    results = again.train(2)
    run.checkpoints.close()
    if started == 2:
        for name, weight in again.weights().items():
            assert torch.equal(weight, run.weights()[name]), name
    return started, results, expected, out.getvalue()


def resumed(plan: Plan, folder: Path, lost: list[int], **more: Any) -> int:
    answers = run_ranks(plan.size, save_then_lose, plan, str(folder), lost, more)
    (started,) = {answer[0] for answer in answers}
    if started == 2:
        assert all(results == expected for _, results, expected, _ in answers)
    else:
        assert "skipping the local checkpoint of iteration 2" in answers[0][3]
        assert "is on none of the nodes that are left" in answers[0][3]
    return started


PLANS = [Plan(tp=2, dp=2, dist_opt=True), Plan(pp=2, dp=2, dtype=torch.bfloat16)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("algorithm", ["fully_parallel", "atomic"])
def test_resuming_is_bit_exact(tmp_path: Path, plan: Plan, algorithm: str) -> None:
    assert resumed(plan, tmp_path, [], non_persistent_local_ckpt_algo=algorithm) == 2


def test_a_lost_node_is_replaced_by_its_copy(tmp_path: Path) -> None:
    copies = {"replication": True, "replication_jump": 2, "replication_factor": 2}
    assert resumed(PLANS[0], tmp_path, [1], **copies) == 2


def test_replicas_of_weights_stand_in_for_a_lost_node_without_copies(tmp_path: Path) -> None:
    plan = Plan(dp=2)
    assert resumed(plan, tmp_path / "atomic", [1], non_persistent_local_ckpt_algo="atomic") == 2


def test_what_is_lost_for_good_falls_back_to_the_persistent_checkpoint(tmp_path: Path) -> None:
    assert resumed(PLANS[0], tmp_path, [1]) == 1


def test_both_copies_lost_falls_back_too(tmp_path: Path) -> None:
    copies = {"replication": True, "replication_jump": 2, "replication_factor": 2}
    assert resumed(PLANS[0], tmp_path, [1, 3], **copies) == 1


def test_local_checkpoints_are_written_in_the_background_too(tmp_path: Path) -> None:
    assert resumed(Plan(tp=2), tmp_path, [], async_save=True) == 2


def save_in_memory(folder: str) -> None:
    plan = Plan(tp=2)
    memory = {"non_persistent_ckpt_type": "in_memory"}
    run = TinyRun(plan)
    root = local_root(plan.arguments(folder, **memory))
    assert str(root).startswith("/dev/shm/")
    try:
        for _ in range(3):
            run.train(1)
            run.save(folder, non_persistent=True, **memory)
        expected = run.train(1)
        dist.barrier()
        assert list(visible_shares(root, checksums=True)) == [3], "only the newest is kept"
        again = TinyRun(plan, seed=3)
        again.load(folder, **memory)
        assert again.state.iteration == 3 and again.train(1) == expected
        dist.barrier()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_checkpoints_in_memory_survive_the_process(tmp_path: Path) -> None:
    run_ranks(2, save_in_memory, str(tmp_path))


def save_damage_load(folder: str) -> int:
    run = TinyRun(Plan())
    run.train(1)
    run.save(folder)
    run.train(1)
    run.save(folder, non_persistent=True, **flags(folder))
    share = Path(folder) / "node0" / "iter_0000002" / "rank_00000"
    data = next(share.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    again = TinyRun(Plan(), seed=2)
    again.load(folder, **flags(folder))
    return again.state.iteration


def test_a_damaged_share_does_not_count(tmp_path: Path) -> None:
    assert run_ranks(1, save_damage_load, str(tmp_path)) == [1]


def load_elsewhere(folder: str) -> tuple[int, str]:
    run = TinyRun(Plan(tp=2))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run.load(folder, **flags(folder))
    return run.state.iteration, out.getvalue()


def test_another_layout_takes_the_persistent_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, save_then_lose, Plan(pp=2), str(tmp_path), [], {})
    answers = run_ranks(2, load_elsewhere, str(tmp_path))
    assert [iteration for iteration, _ in answers] == [1, 1]
    assert "fits its own layout only: tensor_model_parallel_size is 2 here and 1" in answers[0][1]


def test_who_keeps_copies_for_whom() -> None:
    assert replication_groups(8, jump=2, factor=2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert replication_groups(4, jump=1, factor=4) == [[0, 1, 2, 3]]
    for jump, factor in [(3, 2), (2, 1), (0, 2)]:
        with pytest.raises(ValueError, match="must divide the 8 ranks"):
            replication_groups(8, jump, factor)
