"""--task RET-FINETUNE-NQ: a retriever learns from questions with passages, alike in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.program import metrics, refusals, run_program, train_rows
from tests.functional_tests.sentences import write_sentences
from tests.worker_pool import run_ranks

SIZES = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --num-workers 0 --log-interval 1 --no-progress-bar --hidden-dropout 0 --attention-dropout 0 --ict-head-size 16
    --init-method-std 0.1 --biencoder-shared-query-context-model --tokenizer-type BertWordPieceLowerCase
    --task RET-FINETUNE-NQ
"""
LEARNING = "--global-batch-size 8 --lr 3e-3 --lr-warmup-fraction 0.1 --eval-iters 0"
NEGATIVES = "--train-with-neg --train-hard-neg 1"
WORDS = "whale ship sea captain boat head man hand water deck world night".split()
QUESTIONS = ("where is the {}", "what of this {}", "who has a {}", "when was his {}")
EPOCHS = 16


def write_questions(path: Path, questions: tuple[str, ...]) -> None:
    """The passage that answers has the word that follows the question's word; a hard negative has the word itself."""
    rows = []
    for number, word in enumerate(WORDS):
        answer, other = (WORDS[(number + step) % len(WORDS)] for step in (1, 5))
        hard, other = ([{"title": one, "text": f"it was the {one} and the old sea"}] for one in (word, other))
        right = {"title": answer, "text": f"it was the {answer} and the old sea", "passage_id": str(number)}
        for question in questions:
            lists = {"positive_ctxs": [right], "hard_negative_ctxs": hard, "negative_ctxs": other}
            rows.append({"dataset": "nq", "question": question.format(word), "answers": [answer]} | lists)
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary and questions; those of the validation sets are asked in other words."""
    folder = tmp_path_factory.mktemp("questions")
    write_sentences(folder, num_documents=120)
    write_questions(folder / "train.json", QUESTIONS)
    write_questions(folder / "dev.json", ("why is the {}",))
    return folder


def run_task(folder: Path, world_size: int, flags: str) -> str:
    words = f"{SIZES} {LEARNING} --vocab-file {folder}/vocab.txt --valid-data {folder}/dev.json {flags}"
    return run_ranks(world_size, run_program, "tasks/main.py", words.split())[-1]


def results(path: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(path) if "average rank" in row]


@pytest.fixture(scope="module")
def learned(folder: Path) -> Path:
    save = f"--save {folder}/save --save-interval 10000 --metrics-jsonl {folder}/rows.jsonl"
    run_task(folder, 1, f"--micro-batch-size 8 --train-data {folder}/train.json --epochs {EPOCHS} {NEGATIVES} {save}")
    return folder / "rows.jsonl"


def test_what_answers_is_found(folder: Path, learned: Path) -> None:
    rows = results(learned)
    assert [row["iteration"] for row in rows] == [6 * epoch for epoch in range(1, EPOCHS + 1)]
    assert {row["task"] for row in rows} == {"RET-FINETUNE-NQ dev.json"} and rows[0]["passages"] == len(WORDS)
    assert rows[0]["average rank"] > 5  # 6.5 is chance: no passage has the words of its question
    assert rows[-1]["average rank"] < 3 and rows[-1]["top-5 accuracy"] >= 0.9
    best = json.loads((folder / "save/best/accuracy.json").read_text())
    assert best["percent"] == pytest.approx(100 * max(row["top-1 accuracy"] for row in rows))


@pytest.mark.parametrize(
    "layout",
    ["--micro-batch-size 4 --use-distributed-optimizer", "--micro-batch-size 8 --tensor-model-parallel-size 2"],
)
def test_layouts_train_alike(layout: str, folder: Path, learned: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    data = f"--train-data {folder}/train.json --epochs {EPOCHS} {NEGATIVES} --exit-interval 7"
    run_task(folder, 2, f"{layout} {data} --metrics-jsonl {rows}")
    found, expected = train_rows(rows), train_rows(learned)[:7]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    assert results(rows)[0]["average rank"] == pytest.approx(results(learned)[0]["average rank"], abs=0.2)


def test_a_saved_retriever_is_measured_and_taken_further(folder: Path, learned: Path, tmp_path: Path) -> None:
    best = folder / "save/best"
    run_task(folder, 2, f"--micro-batch-size 2 --epochs 0 --load {best} --metrics-jsonl {tmp_path}/rows.jsonl")
    note, (row,) = json.loads((best / "accuracy.json").read_text()), results(tmp_path / "rows.jsonl")
    assert row["top-1 accuracy"] == pytest.approx(note["percent"] / 100) and row["iteration"] == note["iteration"]
    data = f"--micro-batch-size 8 --train-data {folder}/train.json --epochs 1 --lr 1e-30 --metrics-jsonl"
    run_task(folder, 1, f"--pretrained-checkpoint {best} {data} {tmp_path}/more.jsonl")  # in-batch negatives only
    (further,) = results(tmp_path / "more.jsonl")
    assert further["average rank"] == pytest.approx(row["average rank"]) and further["iteration"] == 6


REFUSED = {
    "": "needs --epochs",
    "--epochs 1 --valid-data {folder}/none*.json": "there is no such file",
    "--epochs 1": "needs --train-data",
    "--epochs 0": "needs --load",
    "--epochs 1 --train-data {folder}/vocab.txt": "vocab.txt: no JSON",
    "--epochs 1 --train-with-neg": "--train-hard-neg negatives of each question, found 0: give both",
    "--epochs 1 --train-hard-neg 2": "found 2: give both",
    "--epochs 1 --train-data {folder}/dev.json --global-batch-size 64": "12 examples, too few for a batch of 64",
    "--epochs 1 --train-data {folder}/dev.json --pretrained-checkpoint {folder}": "holds no checkpoint of a retriever",
    "--epochs 1 --query-in-block-prob 0.5": "pretrain_ict.py reads it",
    "--epochs 1 --keep-last": "has no meaning for --task RET-FINETUNE-NQ",
}


def test_refused(folder: Path) -> None:
    common = f"{SIZES} --global-batch-size 8 --micro-batch-size 8 --lr 1e-3 --vocab-file {folder}/vocab.txt"
    lines = [f"{common} --valid-data {folder}/dev.json {flags.format(folder=folder)}".split() for flags in REFUSED]
    (said,) = run_ranks(1, refusals, "tasks/main.py", lines)
    assert [text for message, text in zip(REFUSED.values(), said) if message not in text] == []
