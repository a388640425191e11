"""Tasks during training: the numbers of tasks/main.py, and not a bit of training changes, whatever the layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.functional_tests.program import metrics, refusals, run_program, train_rows
from tests.functional_tests.test_zeroshot_tasks import SIZES, folder, vocabulary
from tests.worker_pool import run_ranks

__all__ = ["folder"]  # the fixture: a vocabulary, and what a model is asked
LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "dp2": (2, "--micro-batch-size 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "tp2-sp": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-interleaved": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --num-layers 4",
    ),
}

MARKS = {"tp2-sp": pytest.mark.slow, "dp2": pytest.mark.slow}


def asked(folder: Path) -> str:
    files = f"LAMBADA={folder}/lambada.jsonl WIKITEXT103={folder}/wikitext.txt"
    return f"--eval-tasks {files} --eval-tasks-interval 2 --strict-lambada --overlapping-eval 10"


def train(folder: Path, world_size: int, flags: str, path: Path) -> list[dict[str, Any]]:
    """Rows of the metrics file of a short run, with dropout."""
    words = (
        f"{SIZES} {vocabulary(folder)} --mock-data --train-iters 4 --global-batch-size 4 --lr 1e-2 --eval-iters 1 "
        f"--eval-interval 3 --num-workers 0 --no-progress-bar --log-interval 1 --metrics-jsonl {path} {flags}"
    ).split()
    run_ranks(world_size, run_program, "pretrain_gpt.py", words)
    return metrics(path)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=MARKS.get(name, ())) for name in LAYOUTS])
def test_training_is_the_same_bit_for_bit(layout: str, folder: Path, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    train(folder, world_size, flags, tmp_path / "without.jsonl")
    rows = train(folder, world_size, f"{flags} {asked(folder)}", tmp_path / "with.jsonl")
    numbers = [
        [[row["lm loss"], row["grad-norm"]] for row in train_rows(tmp_path / f"{name}.jsonl") if "grad-norm" in row]
        for name in ("with", "without")
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4
    found = [(row["task"], row["iteration"]) for row in rows if "task" in row]
    assert found == [(task, step) for step in (2, 4) for task in ("LAMBADA", "WIKITEXT103")]


def test_results_are_those_of_the_saved_model(folder: Path, tmp_path: Path) -> None:
    flags = f"--micro-batch-size 2 {asked(folder)} --save {tmp_path}/save --save-interval 2 --exit-interval 4"
    rows = [row for row in train(folder, 1, flags, tmp_path / "rows.jsonl") if row.get("iteration") == 4]
    during = {row["task"]: row for row in rows if "task" in row}
    for task, more in (
        ("LAMBADA", f"--strict-lambada --valid-data {folder}/lambada.jsonl"),
        ("WIKITEXT103", f"--overlapping-eval 10 --valid-data {folder}/wikitext.txt"),
    ):
        words = f"{SIZES} {vocabulary(folder)} --task {task} --load {tmp_path}/save --micro-batch-size 3 {more}"
        run_ranks(1, run_program, "tasks/main.py", f"{words} --metrics-jsonl {tmp_path}/{task}.jsonl".split())
        after = metrics(tmp_path / f"{task}.jsonl")[-1]
        shared = after.keys() & during[task].keys() - {"iteration", "task"}
        assert len(shared) > 2
        assert {name: during[task][name] for name in shared} == pytest.approx(
            {name: after[name] for name in shared}, rel=1e-6
        )


def draws_around_an_action() -> list[list[float]]:
    """What is drawn after an action that seeds everything, as lm-eval does, and after one whose time has not come."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from tasks import during_training

    def seed(model: Any) -> dict[str, Any]:
        for generator in (random, numpy.random):
            generator.seed(0)
        torch.manual_seed(0)
        return {}

    parallel_state.initialize_model_parallel()
    paused, during_training.interval_paused = during_training.interval_paused, nullcontext  # type: ignore[assignment]
    run: Any = SimpleNamespace(
        state=SimpleNamespace(iteration=6), progress=SimpleNamespace(clear=lambda: None), model=[]
    )
    drawn = []
    for interval in (3, 4):
        for generator in (random, numpy.random):
            generator.seed(5)
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)
        during_training.EvalTasks([seed], interval)(run, None)  # type: ignore[arg-type]
        drawn.append([random.random(), numpy.random.random_sample(), *torch.rand(3).tolist()])
    during_training.interval_paused = paused
    parallel_state.destroy_model_parallel()
    return drawn


def test_generators_stand_where_they_stood() -> None:
    after_the_action, without = run_ranks(1, draws_around_an_action)[0]
    assert after_the_action == without


def test_bad_tasks_are_refused_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"no": 1}\n')
    cases = {
        "--eval-tasks HELLASWAG=x": "where TASK is WIKITEXT103, LAMBADA, LM_EVAL; found HELLASWAG=x",
        "--eval-tasks LAMBADA": "found LAMBADA",
        f"--eval-tasks LAMBADA={tmp_path}/y.jsonl": "there is no such file",
        f"--eval-tasks LAMBADA={tmp_path}/x.jsonl": 'line 1: an object with a "text" is expected',
        f"--eval-tasks LAMBADA={folder}/lambada.jsonl --eval-tasks-interval 0": "at least 1 is expected, found 0",
    }
    lines = [f"{SIZES} {vocabulary(folder)} --mock-data --train-iters 1 {flags}".split() for flags in cases]
    for message, said in zip(cases.values(), run_ranks(1, refusals, "pretrain_gpt.py", lines)[0]):
        assert message in said
