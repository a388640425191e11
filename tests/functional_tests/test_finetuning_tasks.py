"""tasks/main.py finetunes a BERT: it learns rules, alike in every layout, keeps its best model and says what it
answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional_tests.program import metrics, refusals, run_program, train_rows
from tests.functional_tests.sentences import write_sentences
from tests.functional_tests.task_files import write_mnli, write_qqp, write_race
from tests.worker_pool import run_ranks

SIZES = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --num-workers 0 --log-interval 1 --no-progress-bar --hidden-dropout 0 --attention-dropout 0
"""
LEARNING = "--micro-batch-size 4 --global-batch-size 8 --lr 3e-3 --lr-warmup-fraction 0.1 --eval-iters 0"
LAYOUTS = {
    "dp2": (2, "--use-distributed-optimizer"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, a vocabulary, and a pretrained BERT."""
    folder = tmp_path_factory.mktemp("finetuning")
    found = write_sentences(folder, num_documents=40)
    pretraining = f"{SIZES} {LEARNING} --train-iters 2 --split 90,5,5 --save {folder}/bert --save-interval 2"
    words = f"{pretraining} --data-path {found['data']} --vocab-file {found['vocab']} --data-cache-path {folder}/cache"
    run_ranks(1, run_program, "pretrain_bert.py", words.split())
    (folder / "MNLI").mkdir()
    write_mnli(folder / "MNLI/train.tsv", 210)
    write_mnli(folder / "MNLI/dev_matched.tsv", 40, columns=16, seed=1)
    write_mnli(folder / "MNLI/dev_mismatched.tsv", 21, columns=16, seed=2)
    write_mnli(folder / "MNLI/test.tsv", 5, columns=10)
    write_qqp(folder / "QQP.tsv", 36)
    write_qqp(folder / "QQP-dev.tsv", 20, seed=1)
    for split, number in (("train/middle", 80), ("dev/middle", 16), ("dev/high", 8)):
        write_race(folder / "RACE" / split, number, seed=number)
    return folder


def data_of(task: str, folder: Path) -> str:
    if task == "RACE":
        own = folder / "RACE"
        return f"--train-data {own}/train/middle --valid-data {own}/dev/middle {own}/dev/high"
    if task == "QQP":
        return f"--train-data {folder}/QQP.tsv --valid-data {folder}/QQP-dev.tsv"
    own = folder / "MNLI"
    return f"--train-data {own}/train.tsv --valid-data {own}/dev_matched.tsv {own}/dev_mismatched.tsv"


def run_task(folder: Path, task: str, world_size: int, flags: str) -> str:
    """What the last rank printed."""
    words = f"--task {task} {SIZES} {LEARNING} --tokenizer-type BertWordPieceLowerCase --vocab-file {folder}/vocab.txt"
    return run_ranks(world_size, run_program, "tasks/main.py", f"{words} {flags}".split())[-1]


def accuracies(path: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(path) if "accuracy of overall" in row]


@pytest.fixture(scope="module")
def learned(folder: Path) -> dict[str, tuple[Path, str]]:
    """Each corpus finetuned by one process: where its rows are, and what was printed."""
    found = {}
    for task, epochs in (("MNLI", 5), ("RACE", 5), ("QQP", 20)):
        rows = folder / f"{task}.jsonl"
        start = f"--pretrained-checkpoint {folder}/bert --save {folder}/{task}-save --save-interval 10000"
        flags = f"{data_of(task, folder)} --epochs {epochs} {start} --metrics-jsonl {rows}"
        found[task] = rows, run_task(folder, task, 1, flags)
    return found


VALID = {
    "MNLI": {"dev-matched": 40, "dev-mismatched": 21},
    "RACE": {"dev-middle": 16, "dev-high": 8},
    "QQP": {"QQP-dev": 20},
}
"""Validation sets and their sizes."""


@pytest.mark.parametrize("task", list(VALID))
def test_rules_are_learned(task: str, folder: Path, learned: dict[str, tuple[Path, str]]) -> None:
    rows, printed = learned[task]
    last = accuracies(rows)[-1]
    assert last["accuracy of overall"] >= 0.95
    assert "the pretrained checkpoint lacks" not in printed
    total = sum(VALID[task].values())
    together = sum(last[f"accuracy of {name}"] * size for name, size in VALID[task].items()) / total
    assert last["accuracy of overall"] == pytest.approx(together, abs=1e-12)
    right, epochs = round(last["accuracy of overall"] * total), len(accuracies(rows))
    assert f" >> |epoch: {epochs - 1}| overall: correct / total = {right} / {total} = " in printed
    assert [row["epoch"] for row in accuracies(rows)] == list(range(epochs)) and epochs in (5, 20)


# Several choices differ from one only in what crosses stages. 26 and 10 steps are an epoch.
@pytest.mark.parametrize(
    ("task", "layout", "steps"), [("MNLI", "tp2-sp", 8), ("MNLI", "pp2", 8), ("MNLI", "dp2", 26), ("RACE", "pp2", 10)]
)
def test_layouts_train_alike(
    task: str, layout: str, steps: int, folder: Path, learned: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    rows, start = tmp_path / "rows.jsonl", f"--pretrained-checkpoint {folder}/bert --exit-interval {steps + 1}"
    run_task(folder, task, world_size, f"{data_of(task, folder)} --epochs 5 {start} {flags} --metrics-jsonl {rows}")
    reference = train_rows(learned[task][0])
    found = train_rows(rows)
    assert len(found) == steps + 1
    for one, other in zip(found, reference):
        assert one["lm loss"] == pytest.approx(other["lm loss"], rel=2e-4)
        assert one["grad-norm"] == pytest.approx(other["grad-norm"], rel=2e-3)
    assert accuracies(rows)[:1] == ([] if steps < 10 else accuracies(learned[task][0])[:1])


def test_the_best_model_is_kept_and_its_answers_are_written(folder: Path, learned: dict[str, tuple[Path, str]]) -> None:
    own, best = folder / "MNLI", folder / "MNLI-save/best"
    note = json.loads((best / "accuracy.json").read_text())
    shares = [row["accuracy of overall"] for row in accuracies(learned["MNLI"][0])]
    assert note == {"epoch": shares.index(max(shares)), "iteration": 26 * (shares.index(max(shares)) + 1)} | {
        "percent": 100 * max(shares)
    }
    valid = f"--valid-data {own}/dev_matched.tsv {own}/dev_mismatched.tsv {own}/test.tsv"
    printed = run_task(folder, "MNLI", 2, f"{valid} --epochs 0 --load {best} --tensor-model-parallel-size 2")
    right = round(max(shares) * 61)
    assert f">> |epoch: -1| overall: correct / total = {right} / 61 =" in printed
    sets = dict(torch.load(best / "predictions.pt", weights_only=True))
    assert list(sets) == ["dev-matched", "dev-mismatched", "test"]
    found = 0
    for name, size in (("dev-matched", 40), ("dev-mismatched", 21)):
        probabilities, labels, uids = sets[name]
        assert probabilities.shape == (size, 3) and uids.tolist() == list(range(size))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(size))
        found += int((probabilities.argmax(-1) == labels).sum())
    assert found == right
    assert sets["test"][1].tolist() == [-1] * 5


def test_the_last_batch_is_kept_and_a_run_resumes(folder: Path, tmp_path: Path) -> None:
    """36 examples in batches of 8 are 4 steps, 5 with the rest of 4."""
    common = f"{data_of('QQP', folder)} --pretrained-checkpoint {folder}/bert --epochs 2 --keep-last"
    whole, parts, save = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "save"
    printed = run_task(folder, "QQP", 1, f"{common} --metrics-jsonl {whole}")
    assert "1 of 37 lines are not whole and are left out" in printed
    halfway = f"{common} --save {save} --load {save} --save-interval 100 --metrics-jsonl {parts}"
    run_task(folder, "QQP", 1, f"{halfway} --exit-interval 6")
    run_task(folder, "QQP", 1, halfway)
    losses = [row["lm loss"] for row in train_rows(whole)]
    assert len(losses) == 10
    assert [row["lm loss"] for row in train_rows(parts)] == losses


# --- what is refused ------------------------------------------------------------------------------


REFUSED = [
    ("--task MNLI", "needs --epochs"),
    ("--task MNLI --epochs 1", "needs --valid-data"),
    ("--task MNLI --epochs 1 --valid-data {mnli}/dev_matched.tsv", "needs --train-data"),
    ("--task MNLI --epochs 1 --valid-data {mnli}/none*.tsv", "there is no such file"),
    ("--task MNLI --epochs 1 --valid-data {mnli}/test.tsv", "has no labels"),
    ("--task MNLI --epochs 1 --valid-data {mnli}/dev_matched.tsv --train-data {mnli}/test.tsv", "has no labels"),
    ("--task MNLI --epochs 0 --valid-data {mnli}/dev_matched.tsv", "needs --load"),
    ("--task MNLI --epochs 1 --valid-data {mnli}/../QQP.tsv", "MNLI has at least 10 columns"),
    ("--task QQP --epochs 1 --valid-data {mnli}/dev_matched.tsv", "QQP has 6 columns"),
    ("--task RACE --epochs 1 --valid-data {mnli}", "no .txt files in this folder"),
    ("--task RACE --epochs 1 --valid-data {mnli}/train.tsv", "line 1: no JSON"),
    ("--task MNLI --epochs 1 --train-iters 3 {data}", "--epochs is the length of the run"),
    ("--task MNLI --epochs 1 --strict-lambada {data}", "LAMBADA read it"),
    ("--task MNLI --epochs 1 --global-batch-size 256 {data}", "210 examples, too few for a batch of 256"),
    ("--task MNLI --epochs 1 --pretrained-checkpoint {mnli} {data}", "holds no checkpoint"),
    (
        "--task MNLI --epochs 1 --tokenizer-type BertWordPieceCase --pretrained-checkpoint {mnli}/../bert {data}",
        "trained with --tokenizer-type BertWordPieceLowerCase",
    ),
    (
        "--task MNLI --epochs 1 --num-layers 3 --pretrained-checkpoint {mnli}/../bert {data}",
        "encoder.layers",
    ),
    (
        "--task MNLI --epochs 1 --vocab-file {mnli}/../long.txt --pretrained-checkpoint {mnli}/../bert {data}",
        "it is not the tokenizer that the model was trained with",
    ),
    ("--task SQUAD", "'MNLI', 'QQP', 'RACE'"),
]
"""Flags, and what the message says."""


def test_what_cannot_work_is_refused(folder: Path) -> None:
    common = f"{SIZES} {LEARNING} --tokenizer-type BertWordPieceLowerCase --vocab-file {folder}/vocab.txt"
    given = {"mnli": folder / "MNLI", "data": data_of("MNLI", folder)}
    more = "".join(f"word{number}\n" for number in range(300))
    (folder / "long.txt").write_text((folder / "vocab.txt").read_text() + more)
    lines = [f"{common} {flags.format(**given)}".split() for flags, _ in REFUSED]
    (said,) = run_ranks(1, refusals, "tasks/main.py", lines)
    assert [(flags, text) for (flags, message), text in zip(REFUSED, said) if message not in text] == []
