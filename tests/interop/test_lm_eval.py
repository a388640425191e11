"""lm-eval's answers with our model as its model equal those with its own `hf` backend, in several layouts.

Needs the package lm-eval (`pip install 'megatron-core[eval]'`); runs with the slow tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.program import metrics, refusals, run_program, train_rows
from tests.functional_tests.test_zeroshot_tasks import LENGTH, SIZES, folder, hf_model, tokenizer_of, vocabulary
from tests.worker_pool import run_ranks

for package in ("lm_eval", "accelerate"):  # the latter for the backend of the harness
    pytest.importorskip(package, reason=f"{package} is not installed")
transformers = pytest.importorskip("transformers")

__all__ = ["folder"]  # the fixture: a checkpoint, a vocabulary, and questions
pytestmark = pytest.mark.slow

LAYOUTS = {
    "one": (1, "--micro-batch-size 3"),
    "tp2": (2, "--micro-batch-size 8 --tensor-model-parallel-size 2"),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "dp2": (2, "--micro-batch-size 2"),
}
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["whale", "the sea", "old"]
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def requests(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the three kinds of requests."""
    texts = [json.loads(line)["text"] for line in (folder / "lambada.jsonl").read_text().splitlines()][:6]
    return {
        "loglikelihood": [(text, " " + word) for text in texts for word in ("whale", "a ship, and all of it")]
        + [("", texts[0][:20]), ("Ishmael ", "is my name")],
        "loglikelihood_rolling": [(text,) for text in [*texts, "sea"]],
        "generate_until": [(text, {"until": ["e", "\n"], "max_gen_toks": 6}) for text in texts[:4]]
        + [(texts[4], {"until": [], "max_gen_toks": 9, "do_sample": False})],
    }


def answers_of(model: Any, asked: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[Any]]:
    from lm_eval.api.instance import Instance

    return {
        kind: getattr(model, kind)([Instance(kind, {}, words, place) for place, words in enumerate(of_kind)])
        for kind, of_kind in asked.items()
    }


@pytest.fixture(scope="module")
def hf_backend(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    end = "<|endoftext|>"
    bpe = tokenizer_of(folder)._tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)
    return HFLM(pretrained=hf_model(folder), tokenizer=tokenizer, max_length=LENGTH, batch_size=1, device="cpu")


def our_answers(argv: list[str], asked: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[Any]]:
    import sys

    from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
    from megatron.training.checkpoint.load import load_run
    from pretrain_gpt import model_provider
    from tasks.lm_eval_harness.adapter import GPTOfHarness

    sys.argv = ["test", *argv]
    initialize_megatron()
    args = get_args()
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    return answers_of(
        GPTOfHarness(model, get_tokenizer(), length=args.seq_length, batch_size=args.micro_batch_size), asked
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_answers_equal_those_of_the_hf_backend(layout: str, folder: Path, hf_backend: Any) -> None:
    asked = requests(folder)
    expected = answers_of(hf_backend, asked)
    world_size, flags = LAYOUTS[layout]
    argv = f"{SIZES} {vocabulary(folder)} --load {folder}/save {flags}".split()
    for found in run_ranks(world_size, our_answers, argv, asked):
        assert found["generate_until"] == expected["generate_until"]
        assert found["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], abs=1e-4)
        ours, theirs = found["loglikelihood"], expected["loglikelihood"]
        assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-4)
        assert [one[1] for one in ours] == [bool(one[1]) for one in theirs]


def test_results_of_local_tasks_equal_those_of_the_hf_backend(folder: Path, hf_backend: Any, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=folder / "lambada.jsonl"))
    names, manager = ["local_choice", "local_rolling"], TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = simple_evaluate(hf_backend, tasks=names, task_manager=manager, bootstrap_iters=0, limit=20)["results"]
    words = f"{SIZES} {vocabulary(folder)} --load {folder}/save --micro-batch-size 4 --metrics-jsonl {tmp_path}/rows"
    task = f"--task LM_EVAL --lm-eval-tasks {' '.join(names)} --lm-eval-include-path {tmp_path} --limit 20"
    run_ranks(2, run_program, "tasks/main.py", f"{words} {task} --tensor-model-parallel-size 2".split())
    rows = {row["task"]: row for row in metrics(tmp_path / "rows")}
    for task in names:
        for metric, value in expected[task].items():
            if isinstance(value, float):
                assert rows[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert rows["local_choice"]["acc,none"] == expected["local_choice"]["acc,none"]


@pytest.mark.parametrize(("world_size", "flags"), [(1, ""), (2, "--tensor-model-parallel-size 2")])
def test_during_training_it_says_what_it_says_of_the_saved_model(
    world_size: int, flags: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "choice.yaml").write_text(CHOICE.format(file=folder / "lambada.jsonl"))
    shared = f"{SIZES} {vocabulary(folder)} --micro-batch-size 2 --lm-eval-include-path {tmp_path} --limit 12 {flags}"
    train = "--mock-data --train-iters 4 --lr 1e-2 --eval-iters 0 --num-workers 0 --no-progress-bar --log-interval 1"
    train += f" --save {tmp_path}/save --save-interval 4 --metrics-jsonl {tmp_path}/with"
    asked = "--eval-tasks LM_EVAL=local_choice --eval-tasks-interval 2"
    run_ranks(world_size, run_program, "pretrain_gpt.py", f"{shared} {train} {asked}".split())
    plain = f"{shared} {train}".replace(f"{tmp_path}/with", f"{tmp_path}/without").replace("--limit 12", "")
    plain = plain.replace(f"--lm-eval-include-path {tmp_path}", "").replace(f"{tmp_path}/save", f"{tmp_path}/other")
    run_ranks(world_size, run_program, "pretrain_gpt.py", plain.split())
    losses = [[row["lm loss"] for row in train_rows(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    during = [row for row in metrics(tmp_path / "with") if row.get("task") == "local_choice"]
    assert [row["iteration"] for row in during] == [2, 4]
    task = f"--task LM_EVAL --lm-eval-tasks local_choice --load {tmp_path}/save --metrics-jsonl {tmp_path}/after"
    run_ranks(1, run_program, "tasks/main.py", f"{shared} {task}".replace(flags, "").split())
    (after,) = [row for row in metrics(tmp_path / "after") if row.get("task") == "local_choice"]
    numbers = [name for name, value in after.items() if isinstance(value, float)]
    assert "acc,none" in numbers
    assert [during[-1][name] for name in numbers] == pytest.approx([after[name] for name in numbers], rel=1e-6)


def test_unknown_tasks_are_refused(folder: Path) -> None:
    words = f"{SIZES} {vocabulary(folder)} --load {folder}/save --micro-batch-size 1 --task LM_EVAL".split()
    (said,) = run_ranks(1, refusals, "tasks/main.py", [words, [*words, "--lm-eval-tasks", "no_such_task"]])
    assert "needs --lm-eval-tasks" in said[0]
    assert "lm-eval knows no no_such_task" in said[1]
