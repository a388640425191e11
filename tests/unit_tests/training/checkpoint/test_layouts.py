"""Saved in one layout, loaded in another: every tensor bit for bit, and the run goes on as if nothing had happened.

A writer trains, saves, and goes on for some steps; a reader of another layout loads, compares everything that it holds
with the global tensors in the files, and takes the same steps. `PAIRS_TABLE=file.json` keeps the largest relative
difference of a loss of each pair.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_plain_tensors
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import split_for_saving
from megatron.training.checkpoint.save import content_metadata
from megatron.training.checkpoint.state import sharded_model
from tests.unit_tests.training.checkpoint.tiny_run import Plan, TinyRun
from tests.worker_pool import run_ranks

STEPS = 5
LAYERS = 8
COPY = "optimizer.state.fp32_param."


def all_layouts(most_ranks: int) -> list[Plan]:
    """Every combination of sizes and optimizers that this many ranks can run."""
    sizes = itertools.product((1, 2, 4), (1, 2, 4), (None, 2), (1, 2, 4), (False, True))
    return [
        Plan(tp=tp, pp=pp, vpp=vpp, dp=dp, dist_opt=dist_opt, dropout=0.0, layers=LAYERS)
        for tp, pp, vpp, dp, dist_opt in sizes
        if tp * pp * dp <= most_ranks and (vpp is None or pp > 1) and (4 // dp) % pp == 0
    ]


def name_of(plan: Plan) -> str:
    chunks = f"v{plan.vpp}" if plan.vpp else ""
    return f"tp{plan.tp}pp{plan.pp}{chunks}dp{plan.dp}{'-sharded' if plan.dist_opt else ''}"


def whole_losses(run: TinyRun, steps: int) -> list[float]:
    """Loss of each step over all samples, on every rank."""
    own = [loss for loss, *_ in run.train(steps)]
    counts = parallel_state.get_tensor_model_parallel_rank() == 0 and own[0] is not None
    total = torch.tensor([loss if counts else 0.0 for loss in own], dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def save_and_go_on(plan: Plan, folder: str) -> list[float]:
    run = TinyRun(plan)
    run.train(2)
    with contextlib.redirect_stdout(io.StringIO()):
        run.save(folder)
    return whole_losses(run, STEPS)


def own_shards(run: TinyRun) -> list[ShardedTensor]:
    """Parameters, main parameters and moments that this rank holds."""
    args = run.plan.arguments("")
    model_state = sharded_model(run.model, content_metadata(args))
    state = {"model": model_state, "optimizer": run.optimizer.sharded_state_dict(model_state)}
    sharded, _ = split_for_saving(state)
    return [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]


def load_each_and_go_on(plan: Plan, folders: list[str]) -> list[list[float]]:
    """Losses after loading each of the checkpoints; every shard is compared with the global tensor."""
    results = []
    for folder in folders:
        run = TinyRun(plan, seed=1000)
        with contextlib.redirect_stdout(io.StringIO()):
            run.load(folder)
        assert run.state.iteration == 2
        tensors = load_plain_tensors(f"{folder}/iter_0000002")
        kinds = set()
        for shard in own_shards(run):
            assert shard.data is not None
            key = shard.key  # an unsharded fp32 optimizer has no copies of the weights
            box = tensors[key if key in tensors else key.removeprefix(COPY)][shard.global_slice()]
            flat = shard.flattened_range
            expected = box if flat is None else box.reshape(-1)[flat]
            assert torch.equal(shard.data, expected), shard.key
            kinds.add(shard.key.split(".")[2] if shard.key.startswith("optimizer.") else "parameter")
        assert {"parameter", "exp_avg", "exp_avg_sq"} <= kinds or not run.optimizer.param_groups
        results.append(whole_losses(run, STEPS))
    return results


def check_pairs(layouts: list[Plan], readers: list[Plan], tmp_path: Path) -> int:
    """Every reader continues every writer; returns the number of pairs.

    `PAIRS_TABLE` gets the largest relative difference of a loss, by writer and reader, after each reader.
    """
    folders = {plan: str(tmp_path / name_of(plan)) for plan in layouts}
    expected = {plan: run_ranks(plan.size, save_and_go_on, plan, folder)[0] for plan, folder in folders.items()}
    pairs, deviations = 0, dict[str, dict[str, float]]()
    for reader in readers:
        answers: list[Any] = run_ranks(reader.size, load_each_and_go_on, reader, list(folders.values()), timeout=900)
        for writer, losses in zip(folders, answers[0]):
            deviation = max(abs(loss / known - 1) for loss, known in zip(losses, expected[writer]))
            deviations.setdefault(name_of(writer), {})[name_of(reader)] = deviation
            assert losses == pytest.approx(expected[writer], rel=1e-5), f"{name_of(writer)} -> {name_of(reader)}"
            pairs += 1
        if table := os.environ.get("PAIRS_TABLE"):
            Path(table).write_text(json.dumps(deviations, indent=1) + "\n")
    return pairs


@pytest.mark.timeout(900)
def test_random_pairs_of_layouts(tmp_path: Path) -> None:
    chance = random.Random(5)
    small, large = all_layouts(2), all_layouts(4)
    writers = [*chance.sample(small, 3), *chance.sample([p for p in large if p.size == 4], 3)]
    readers = [*chance.sample(small, 3), *chance.sample([p for p in large if p.size == 4], 4)]
    assert any(plan.vpp for plan in writers) and any(plan.vpp for plan in readers)
    assert check_pairs(writers, readers, tmp_path) >= 40


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_pairs_of_many_layouts(tmp_path: Path) -> None:
    chance = random.Random(7)
    layouts = all_layouts(8)
    writers, readers = chance.sample(layouts, 18), chance.sample(layouts, 18)
    assert check_pairs(writers, readers, tmp_path) >= 300
