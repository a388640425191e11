"""Every pipeline schedule through the program: the numbers of one process, checkpoints for any other, bit-exact
resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional_tests.program import metrics, pretrain_gpt, train_rows
from tests.worker_pool import RankFailure

STEPS = 6
EXACT = "--attention-dropout 0 --hidden-dropout 0 --weight-decay 0.1"
PP2 = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
ZERO_BUBBLE_V = f"{PP2} --pipeline-schedule zb-v"
UNTIED = "--untie-embeddings-and-output-weights"

LAYOUTS = {
    "gpipe": (2, f"{PP2} --pipeline-schedule gpipe"),
    "interleaved": (2, INTERLEAVED),
    "interleaved-pp4-tp2-sp-dp1": (
        8,
        "--pipeline-model-parallel-size 4 --num-layers 8 --num-layers-per-virtual-pipeline-stage 1 "
        "--tensor-model-parallel-size 2 --sequence-parallel --no-overlap-p2p-communication",
    ),
    "zb-h1-overlapped": (4, f"{PP2} --pipeline-schedule zb-h1 --overlap-grad-reduce --use-distributed-optimizer"),
    "zb-v-tp2-sp": (4, f"{ZERO_BUBBLE_V} --tensor-model-parallel-size 2 --sequence-parallel"),
    "zb-v-untied": (2, f"{ZERO_BUBBLE_V} {UNTIED}"),
    "layout-with-empty-stages": (2, f"{PP2} --pipeline-model-parallel-layout Ett|t|,|t||L"),
    "counted-ends": (
        2,
        f"{INTERLEAVED} --num-layers 6 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    "postponed-output": (
        2,
        f"{PP2} --defer-embedding-wgrad-compute --wgrad-deferral-limit 2 --delay-wgrad-compute",
    ),
}


def run(path: Path, world_size: int, flags: str) -> list[str]:
    return pretrain_gpt(world_size, f"--train-iters {STEPS} {flags} --metrics-jsonl {path}")


def model_flags(flags: str) -> str:
    """Those that change the model and not its layout."""
    layers = flags.split("--num-layers ")[1].split()[0] if "--num-layers " in flags else "4"
    return f"--num-layers {layers} {UNTIED if UNTIED in flags else ''}"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What one process computes for each model, filled as it is asked for."""
    return {}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_losses_equal_one_process(layout: str, one_process: dict[str, list[dict]], tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    model = model_flags(flags)
    evaluate = "--eval-iters 1 --eval-interval 3"
    if model not in one_process:
        run(tmp_path / "one.jsonl", 1, f"{EXACT} {evaluate} {model}")
        one_process[model] = metrics(tmp_path / "one.jsonl")
    run(tmp_path / "found.jsonl", world_size, f"{EXACT} {evaluate} {flags}")
    rows = metrics(tmp_path / "found.jsonl")
    assert len(rows) == len(one_process[model])
    for row, one in zip(rows, one_process[model]):
        assert row["iteration"] == one["iteration"]
        for name in ("lm loss", "lm loss validation"):
            assert (name in row) == (name in one)
            if name in row:
                assert row[name] == pytest.approx(one[name], rel=1e-6)
        if "grad-norm" in row:
            assert row["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-6)


def test_the_rank_with_the_loss_prints_it(tmp_path: Path) -> None:
    """In a V that is a rank of the first stage."""
    printed = run(tmp_path / "v.jsonl", 4, f"{EXACT} {ZERO_BUBBLE_V} --eval-iters 1 --eval-interval 5")
    reports = [("lm loss:" in text, "validation loss at" in text) for text in printed]
    assert reports == [(False, False), (True, True), (False, False), (False, False)]


@pytest.mark.parametrize(
    ("flags", "ckpt_format"),
    [
        (INTERLEAVED, "torch_dist"),
        (f"{ZERO_BUBBLE_V} --use-distributed-optimizer", "torch_dist"),
        (INTERLEAVED, "torch"),
    ],
)
def test_resume_is_bit_exact(flags: str, ckpt_format: str, tmp_path: Path) -> None:
    flags = f"{flags} --attention-dropout 0.1 --hidden-dropout 0.1 --log-params-norm --ckpt-format {ckpt_format}"
    save = f"--save {tmp_path / 'save'} --save-interval 3"
    run(tmp_path / "whole.jsonl", 2, flags)
    run(tmp_path / "parts.jsonl", 2, f"{flags} {save} --exit-interval 3")
    run(tmp_path / "parts.jsonl", 2, f"{flags} {save} --load {tmp_path / 'save'}")
    names = ("iteration", "lm loss", "grad-norm", "params-norm", "consumed_samples")
    found, expected = (
        [[row[name] for name in names] for row in train_rows(tmp_path / f"{part}.jsonl")] for part in ("parts", "whole")
    )
    assert len(found) == STEPS
    assert found == expected


def test_checkpoints_load_into_other_numbers_of_chunks(tmp_path: Path) -> None:
    """The optimizer's state, too: the curve continues."""
    run(tmp_path / "whole.jsonl", 1, EXACT)
    stages = [(2, INTERLEAVED), (2, ZERO_BUBBLE_V), (2, PP2), (2, f"{PP2} --pipeline-model-parallel-layout E|ttt|t|L")]
    save = f"--save {tmp_path / 'save'} --save-interval 1 --load {tmp_path / 'save'}"
    for number, (world_size, flags) in enumerate([*stages, (1, "")], start=1):
        run(tmp_path / "parts.jsonl", world_size, f"{EXACT} {save} --exit-interval {number} {flags}")
    rows = train_rows(tmp_path / "parts.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    for row, one in zip(rows, train_rows(tmp_path / "whole.jsonl")):
        assert row["lm loss"] == pytest.approx(one["lm loss"], rel=1e-6)


def test_files_of_a_layout_are_refused_with_other_chunks(tmp_path: Path) -> None:
    save = f"{EXACT} --save {tmp_path / 'save'} --save-interval 1 --load {tmp_path / 'save'} --exit-interval 1"
    run(tmp_path / "m.jsonl", 2, f"{save} --ckpt-format torch {INTERLEAVED}")
    with pytest.raises(RankFailure, match="model: not in the checkpoint, which has .*model0, model1"):
        run(tmp_path / "m.jsonl", 2, f"{save} --ckpt-format torch {PP2}")
