"""pretrain_ict.py and tools/create_doc_index.py on real sentences: from a BERT to an index of blocks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy
import pytest

from megatron.core.extensions.mips_index import FaissMIPSIndex
from megatron.training.retrieval.block_data import BlockData
from tests.functional_tests.program import metrics, refusals, run_program
from tests.functional_tests.sentences import write_sentences
from tests.worker_pool import run_ranks

NUMBERS = ("loss", "top1_acc", "top5_acc", "grad-norm")
SIZES = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48"
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sentences")
    found = write_sentences(directory, num_documents=120)
    return (
        f"--data-path {found['data']} --titles-data-path {found['titles']} --vocab-file {found['vocab']} "
        f"--data-cache-path {directory / 'cache'} --num-workers 0"
    )


def without_titles(data: str) -> str:
    return re.sub(r"--titles-data-path \S+ ", "", data)


def pretrain(program: str, world_size: int, data: str, flags: str) -> list[str]:
    common = (
        f"{SIZES} --global-batch-size 16 --lr 3e-3 --split 90,10,0 --eval-iters 0 --log-interval 1 --no-progress-bar "
        "--hidden-dropout 0 --attention-dropout 0 --no-bias-gelu-fusion"
    )
    return run_ranks(world_size, run_program, program, f"{common} {data} {flags}".split())


def pretrain_ict(world_size: int, data: str, flags: str) -> list[str]:
    return pretrain(
        "pretrain_ict.py", world_size, data, f"--ict-head-size 16 --retriever-report-topk-accuracies 1 5 {flags}"
    )


def rows_of(path: Path) -> list[list[float]]:
    return [[row[name] for name in NUMBERS] for row in metrics(path) if "grad-norm" in row]


@pytest.fixture(scope="module")
def bert(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("bert")
    flags = f"--micro-batch-size 8 --train-iters 4 --save {save} --save-interval 4 --save-hf {save}/hf"
    pretrain("pretrain_bert.py", 1, without_titles(data), flags)
    return save


# Plain gradient descent: two encoders that hardly differ yet have gradients near 0, whose rounding Adam would blow up.
DESCENT = f"--optimizer sgd --train-iters {STEPS}"


@pytest.fixture(scope="module")
def expected(data: str, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], Path]:
    """Numbers of each step of one process, and its checkpoint."""
    directory = tmp_path_factory.mktemp("one")
    pretrain_ict(
        1,
        data,
        f"--bert-load {bert} --micro-batch-size 8 {DESCENT} --metrics-jsonl {directory / 'rows.jsonl'} "
        f"--save {directory / 'save'} --save-interval {STEPS // 2}",
    )
    rows = rows_of(directory / "rows.jsonl")
    assert len(rows) == STEPS and all(0 <= row[1] <= row[2] <= 100 for row in rows)
    return rows, directory / "save"


@pytest.mark.parametrize(
    "layout",
    [
        "--micro-batch-size 4 --use-distributed-optimizer",
        "--micro-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_numbers_equal_one_process(
    layout: str, data: str, bert: Path, expected: tuple[list[list[float]], Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    pretrain_ict(2, data, f"--bert-load {bert} {DESCENT} --metrics-jsonl {path} {layout}")
    assert numpy.array(rows_of(path)) == pytest.approx(numpy.array(expected[0]), rel=1e-4)


def test_resume_is_bit_exact(data: str, expected: tuple[list[list[float]], Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    said = pretrain_ict(
        1,
        data,
        f"--bert-load nowhere --load {expected[1]} --ckpt-step {STEPS // 2} --micro-batch-size 8 {DESCENT} "
        f"--metrics-jsonl {path}",
    )
    assert "starting from" not in said[0]
    assert rows_of(path) == expected[0][STEPS // 2 :]


def test_a_bert_of_hugging_face_is_as_good_a_start(
    data: str, bert: Path, expected: tuple[list[list[float]], Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    flags = f"--bert-load hf:{bert}/hf --micro-batch-size 8 --optimizer sgd --train-iters 1 --metrics-jsonl {path}"
    pretrain_ict(1, data, flags)
    assert rows_of(path)[0] == pytest.approx(expected[0][0], rel=1e-6)


@pytest.fixture(scope="module")
def trained(data: str, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoder for both, that has seen the blocks some times; its validation blocks are never trained on."""
    save = tmp_path_factory.mktemp("trained")
    flags = "--biencoder-shared-query-context-model --query-in-block-prob 0.3 --retriever-score-scaling"
    pretrain_ict(
        1, data, f"--bert-load {bert} {flags} --micro-batch-size 16 --train-iters 60 --save {save} --save-interval 60"
    )
    return save


def index_blocks(world_size: int, data: str, load: Path, path: Path) -> dict[int, numpy.ndarray]:
    flags = f"{SIZES} {data} --ict-head-size 16 --biencoder-shared-query-context-model --ict-load {load}"
    flags += f" --block-data-path {path} --indexer-batch-size 32 --indexer-log-interval 1"
    said = run_ranks(world_size, run_program, "tools/create_doc_index.py", flags.split())
    assert "> batch 2: " in said[0]
    return BlockData.load(path).embed_data


def test_an_index_of_several_ranks_is_that_of_one(data: str, trained: Path, tmp_path: Path) -> None:
    one = index_blocks(1, data, trained, tmp_path / "one.pkl")
    two = index_blocks(2, data, trained, tmp_path / "two.pkl")
    assert list(one) == list(two) == list(range(len(one))) and len(one) > 100
    assert [path.name for path in tmp_path.iterdir()] in (["one.pkl", "two.pkl"], ["two.pkl", "one.pkl"])
    assert max(numpy.abs(one[i].astype(float) - two[i].astype(float)).max() for i in one) < 1e-2
    index = FaissMIPSIndex(16, one)
    _, ids = index.search_mips_index(numpy.stack([two[i] for i in two]), 5, reconstruct=False)
    assert len(ids) == len(one)


# --- passages of a table, and questions about them ------------------------------------------------


def test_questions_are_answered_from_a_table_of_passages(data: str, trained: Path, tmp_path: Path) -> None:
    words = "whale ship sea captain boat harpoon deck crew mast sailor".split()
    rows = [
        f"{number}\tthe {word} and the old man . it is the {word} .\t{word}" for number, word in enumerate(words, 7)
    ]
    (tmp_path / "wiki.tsv").write_text("\n".join(["doc_id\ttext\ttitle", *rows]) + "\n")
    questions = [f"where is the {word}\t['nothing', 'the {word} and']" for word in words]
    (tmp_path / "dev.tsv").write_text("\n".join(questions) + "\n")
    vocabulary = re.search(r"--vocab-file \S+", data)[0]  # type: ignore[index]
    shared = f"{SIZES} {vocabulary} --ict-head-size 16 --biencoder-shared-query-context-model --ict-load {trained}"
    shared += (
        f" --evidence-data-path {tmp_path}/wiki.tsv --embedding-path {tmp_path}/wiki.pkl --retriever-seq-length 32"
    )
    run_ranks(2, run_program, "tools/create_doc_index.py", f"{shared} --indexer-batch-size 4".split())
    found = []
    for world_size, batch in ((1, 10), (2, 3)):
        path = tmp_path / f"{world_size}.jsonl"
        task = f"--task RETRIEVER-EVAL --qa-data-dev {tmp_path}/dev.tsv --faiss-topk-retrievals 10"
        flags = f"{shared} {task} --micro-batch-size {batch} --metrics-jsonl {path}"
        run_ranks(world_size, run_program, "tasks/main.py", flags.split())
        found.append(metrics(path)[-1])
    assert [row.pop("task") for row in found] == 2 * ["RETRIEVER-EVAL dev"]
    assert found[0] == found[1] and found[0].keys() >= {"top-1 accuracy", "top-5 accuracy"}
    assert 0.1 < found[0]["top-5 accuracy"] <= 1
    expected = reference_accuracy(data, trained, tmp_path, words)
    assert (found[0]["top-1 accuracy"], found[0]["top-5 accuracy"]) == expected


def reference_accuracy(data: str, trained: Path, folder: Path, words: list[str]) -> tuple[float, float]:
    """Top-1 and top-5 accuracy by whole matrices."""
    vectors = BlockData.load(folder / "wiki.pkl").embed_data
    queries = run_ranks(1, query_vectors, data, trained, [f"where is the {word}" for word in words])[0]
    scores = queries @ numpy.stack([vectors[7 + i] for i in range(len(words))]).astype(numpy.float32).T
    places = (scores > numpy.diag(scores)[:, None]).sum(1)
    return float((places < 1).mean()), float((places < 5).mean())


def query_vectors(data: str, trained: Path, texts: list[str]) -> numpy.ndarray:
    import torch

    from megatron.training import get_model, get_tokenizer, initialize_megatron
    from megatron.training.checkpointing import load_biencoder_checkpoint
    from pretrain_ict import model_provider

    vocabulary = re.search(r"--vocab-file \S+", data)[0]  # type: ignore[index]
    flags = f"{SIZES} {vocabulary} --ict-head-size 16 --biencoder-shared-query-context-model --micro-batch-size 1"
    sys.argv = ["test", *flags.split()]
    initialize_megatron(
        args_defaults={
            "tokenizer_type": "BertWordPieceLowerCase",
            "model_family": "retrieval",
            "no_load_optim": True,
            "no_load_rng": True,
        }
    )
    (model,) = load_biencoder_checkpoint(get_model(model_provider, wrap_with_ddp=False), custom_load_path=str(trained))
    tokenizer, rows = get_tokenizer(), []
    for text in texts:  # one at a time, without padding
        tokens = torch.tensor([[tokenizer.cls, *tokenizer.tokenize(text), tokenizer.sep]])
        with torch.no_grad():
            rows.append(model.eval()(query_tokens=tokens, query_mask=torch.ones_like(tokens))[0][0])
    return torch.stack(rows).numpy()


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "pretrain_ict.py": {
        "--pipeline-model-parallel-size 2": "retrieval has two; use --tensor-model",
        "--biencoder-projection-dim 8 --ict-head-size 16": "two names of one width",
        "--query-in-block-prob 1.5": "must be 0 to 1",
        "--retriever-report-topk-accuracies 0 5": "each k must be positive",
        "--indexer-batch-size 7": "only tools/create_doc_index.py reads it",
    },
    "pretrain_bert.py": {"--ict-head-size 16": "only pretrain_ict.py and tools/create_doc_index.py reads it"},
    "tools/create_doc_index.py": {
        "--block-data-path x": "--ict-load is missing",
        "--ict-load x": "give --block-data-path to embed",
        "--ict-load x --embedding-path y": "--evidence-data-path is missing",
        "--ict-load x --embedding-path y --evidence-data-path /nowhere": "there is no such file",
        "--ict-load x --block-data-path y --data-path z --sample-rate 2": "must be above 0 and at most 1",
        "--ict-load x --block-data-path y --data-path z --bert-load u": "only pretrain_ict.py reads it",
    },
    "tasks/main.py": {
        "--task RETRIEVER-EVAL": "needs --qa-data-dev or --qa-data-test",
        "--task ICT-ZEROSHOT-NQ --qa-data-test {dev}": "needs --evidence-data-path",
        "--task RETRIEVER-EVAL --qa-data-dev {dev} --evidence-data-path {dev} --embedding-path {dev}": "--ict-load",
        "--task RETRIEVER-EVAL --qa-data-dev {dev} --evidence-data-path {dev} --embedding-path {dev} --ict-load x": (
            "columns doc_id, text, title are expected"
        ),
    },
}
"""Program -> its flags and what the message says."""


@pytest.mark.parametrize("program", list(REFUSED))
def test_refused(program: str, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("who\t['Ahab']\n")
    tiny = f"{SIZES} --micro-batch-size 2 --train-iters 1 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 60"
    lines = [f"{tiny} {flags.format(dev=tmp_path / 'dev.tsv')}".split() for flags in REFUSED[program]]
    for message, said in zip(REFUSED[program].values(), run_ranks(1, refusals, program, lines)[0]):
        assert message in said
