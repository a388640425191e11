"""tasks/main.py: WikiText perplexity and LAMBADA accuracy, equal to Hugging Face's model, alike in every layout."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional_tests.program import metrics, pretrain_gpt, refusals, run_program
from tests.functional_tests.sentences import BOOK
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LENGTH, STRIDE = 24, 10
SIZES = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH}
    --tokenizer-type GPT2BPETokenizer --make-vocab-size-divisible-by 8 --no-load-optim --no-load-rng
"""
LAYOUTS = {
    "batch 8": (1, "--micro-batch-size 8"),
    "dp2": (2, "--micro-batch-size 3"),
    "tp2-sp": (2, "--micro-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, a checkpoint of a model with it, and what it is asked."""
    folder = tmp_path_factory.mktemp("zeroshot")
    with gzip.open(BOOK, "rt", encoding="utf-8") as book:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", book.read()) if len(p) > 300][:120]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(paragraphs, vocab_size=600, min_frequency=2, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(folder))
    spaced = "\n".join(re.sub(r"([.,;!?:()\"'])", r" \1 ", text) for text in paragraphs[:3])
    (folder / "wikitext.txt").write_text(f" = A heading = \n {spaced} \n The 1 @,@ 000 @-@ year @-@ old ( whale ) . \n")
    save = f"--save {folder}/save --save-interval 1 --ckpt-format torch_dist --save-hf {folder}/hf"
    data = f"--mock-data --train-iters 1 --micro-batch-size 1 --lr 1e-4 --init-method-std 0.5 --eval-iters 0 {save}"
    pretrain_gpt(1, f"{SIZES} {vocabulary(folder)} {data} --num-workers 0 --no-progress-bar", tiny=False)
    write_passages(folder, paragraphs)
    return folder


def vocabulary(folder: Path) -> str:
    return f"--vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt"


def hf_model(folder: Path) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").eval()


def tokenizer_of(folder: Path) -> Any:
    return tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")


@torch.no_grad()
def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0, -1].double()[:600]


def write_passages(folder: Path, paragraphs: list[str]) -> None:
    """Passages of which the model knows some last words."""
    model, bpe, passages = hf_model(folder), tokenizer_of(folder), []
    for text in paragraphs[:60]:
        beginning = text[: 40 + len(text) % 100].rsplit(" ", 1)[0]
        guess = bpe.decode([int(next_logits(model, bpe.encode(beginning).ids[-LENGTH:]).argmax())])
        passages.append(beginning + guess if re.fullmatch(r" [a-z]+", guess) else f"{beginning} whale")
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))


def run_task(folder: Path, path: Path, world_size: int, flags: str) -> tuple[dict[str, Any], str]:
    """What the task reports at full precision, and what the last rank prints."""
    words = (
        f"{SIZES} {vocabulary(folder)} --load {folder}/save --metrics-jsonl {path} --log-interval 10 {flags}".split()
    )
    printed = run_ranks(world_size, run_program, "tasks/main.py", words)
    return metrics(path)[-1], printed[-1]


# --- WikiText -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wikitext(folder: Path) -> tuple[dict[str, Any], str]:
    flags = f"--task WIKITEXT103 --valid-data {folder}/wikitext.txt --overlapping-eval {STRIDE} --micro-batch-size 1"
    return run_task(folder, folder / "wikitext.jsonl", 1, flags)


def test_perplexity_equals_hugging_face(folder: Path, wikitext: tuple[dict[str, Any], str]) -> None:
    from tasks.zeroshot_gpt.detokenizer import detokenize

    found, printed = wikitext
    model, words = hf_model(folder), (folder / "wikitext.txt").read_text()
    tokens = tokenizer_of(folder).encode(detokenize(words)).ids
    loss = 0.0
    for place in range(1, len(tokens)):  # one at a time, from the beginning of its window
        begin = max(0, math.ceil((place - LENGTH) / STRIDE)) * STRIDE
        loss -= float(next_logits(model, tokens[begin:place]).log_softmax(-1)[tokens[place]])
    mean, ratio = loss / (len(tokens) - 1), (len(tokens) - 1) / (len(words.strip().split(" ")) - 1)
    assert found["avg loss"] == pytest.approx(mean, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["token ratio"] == ratio
    assert found["adjusted ppl"] == pytest.approx(math.exp(min(20, mean * ratio)), rel=1e-4)
    assert f" validation results on WIKITEXT103 | avg loss: {mean:.4E} | ppl: " in printed


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_perplexity_is_the_same_in_every_layout(
    layout: str, folder: Path, wikitext: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    task = f"--task WIKITEXT103 --valid-data {folder}/wikitext.txt --overlapping-eval {STRIDE}"
    found, printed = run_task(folder, tmp_path / "rows.jsonl", world_size, f"{task} {flags}")
    assert found["avg loss"] == pytest.approx(wikitext[0]["avg loss"], rel=1e-6)
    result = "validation results on WIKITEXT103"
    assert [line for line in printed.splitlines() if result in line] == [
        line for line in wikitext[1].splitlines() if result in line
    ]


# --- LAMBADA --------------------------------------------------------------------------------------


def passages_guessed(folder: Path, whole_word: bool) -> list[bool]:
    """By greedy decoding of one passage at a time."""
    model, bpe, right = hf_model(folder), tokenizer_of(folder), []
    for line in (folder / "lambada.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        beginning, _, word = text.rpartition(" ")
        tokens = bpe.encode(text).ids
        given, answer = tokens[:-1], tokens[-1:]
        if whole_word:
            given, answer = bpe.encode(beginning).ids, bpe.encode(" " + word).ids
        given, said = given[-(LENGTH + 1 - len(answer)) :], []
        for _ in answer:
            said.append(int(next_logits(model, given + said).argmax()))
        right.append(said == answer)
    return right


@pytest.mark.parametrize(
    ("whole_word", "world_size", "flags"),
    [
        (False, 1, "--micro-batch-size 1"),
        (True, 1, "--micro-batch-size 8"),
        (True, 2, "--micro-batch-size 2 --tensor-model-parallel-size 2"),
        (False, 2, "--micro-batch-size 7 --pipeline-model-parallel-size 2"),
        (True, 2, "--micro-batch-size 3"),
    ],
)
def test_lambada_equals_greedy_decoding(
    whole_word: bool, world_size: int, flags: str, folder: Path, tmp_path: Path
) -> None:
    expected = passages_guessed(folder, whole_word)
    assert {True, False} == set(expected)
    task = f"--task LAMBADA --valid-data {folder}/lambada.jsonl {'--strict-lambada' if whole_word else ''}"
    found, printed = run_task(folder, tmp_path / "rows.jsonl", world_size, f"{task} {flags}")
    assert (found["number correct"], found["total examples"]) == (sum(expected), len(expected))
    shown = [f"number correct: {sum(expected):.4E}", f"total examples: {len(expected):.4E}", "avg accuracy: "]
    assert " | ".join([" validation results on LAMBADA", *shown]) in printed


# --- what is refused ------------------------------------------------------------------------------


REFUSED = [
    ("--task HELLASWAG", "'WIKITEXT103', 'LAMBADA'"),
    ("--task LAMBADA", "--valid-data is missing"),
    ("--task LAMBADA --valid-data {folder}/none*.jsonl", "none*.jsonl: there is no such file"),
    ("--task LAMBADA --valid-data {folder}/wikitext.txt", "wikitext.txt, line 1: no JSON"),
    ("--task LAMBADA --valid-data {folder}/vocab.json", 'an object with a "text" is expected'),
    ("--task WIKITEXT103 --valid-data {folder}/hf/model.safetensors", "no UTF-8 text"),
    ("--task WIKITEXT103 --valid-data {folder}/wikitext.txt {folder}/vocab.json", "reads one file, found 2"),
    ("--task WIKITEXT103 --valid-data {folder}/wikitext.txt --strict-lambada", "LAMBADA read it"),
    ("--task WIKITEXT103 --valid-data {folder}/wikitext.txt --overlapping-eval 25", "must be between 1 and"),
    ("--task WIKITEXT103 --valid-data {folder}/wikitext.txt --load {folder}/nothing", "SystemExit: 1"),
    (
        "--task WIKITEXT103 --valid-data {folder}/wikitext.txt --tokenizer-type NullTokenizer --vocab-size 599",
        "trained with --tokenizer-type GPT2BPETokenizer, this run has NullTokenizer",
    ),
]
"""Flags, and what the message says."""


def test_what_cannot_work_is_refused(folder: Path) -> None:
    common = f"{SIZES} {vocabulary(folder)} --load {folder}/save --micro-batch-size 1"
    lines = [f"{common} {flags.format(folder=folder)}".split() for flags, _ in REFUSED]
    (said,) = run_ranks(1, refusals, "tasks/main.py", lines)
    assert [(flags, text) for (flags, message), text in zip(REFUSED, said) if message not in text] == []
