"""The launch scripts under examples/: every flag they give resolves for the number of ranks they ask for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron.training.arguments import parse_args
from tests.functional_tests.program import ROOT, run_program
from tools.run_text_generation_server import add_server_arguments

FAKE_TORCHRUN = """#!/usr/bin/env bash
# Instead of starting ranks: what each of them would run.
while [[ $1 != *.py ]]; do shift; done
printf '%s\\n' "$@"
"""


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Arguments of a launch script, with a vocabulary of all bytes."""
    vocabulary = {chr(256 + byte): byte for byte in range(256)} | {"<|endoftext|>": 256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    names = ("checkpoints", "tensorboard", "vocab.json", "merges.txt", "data_text_document")
    return [str(tmp_path / name) for name in names]


@pytest.fixture
def word_piece_places(tmp_path: Path) -> list[str]:
    """The same of scripts whose models read word pieces."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]) + "\n")
    return [str(tmp_path / name) for name in ("checkpoints", "tensorboard", "vocab.txt", "data_text_sentence")]


def launch(script: str, world_size: int, places: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "torchrun").write_text(FAKE_TORCHRUN)
    (programs / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "WORLD_SIZE": str(world_size)}
    command = ["bash", str(ROOT / script), *places]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)


def explanation(
    script: str, world_size: int, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What rank 0 of so many says to --explain-config."""
    launched = launch(script, world_size, places, tmp_path)
    assert launched.returncode == 0, launched.stderr
    program, *flags = launched.stdout.splitlines()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.chdir(tmp_path)
    return run_program(Path(program).name, ["--explain-config", *flags])


@pytest.mark.parametrize(
    ("script", "world_size", "settings"),
    [
        (
            "examples/gpt3/train_gpt3_175b_distributed.sh",
            1024,
            {
                "tensor_model_parallel_size": "8",
                "pipeline_model_parallel_size": "16",
                "data_parallel_size": "8",
                "global_batch_size": "1536",
                "rampup_batch_size": "16 16 5859375",
                "kv_channels": "128",
            },
        ),
        ("examples/gpt3/train_gpt3_345m.sh", 8, {"data_parallel_size": "8", "kv_channels": "64"}),
    ],
)
def test_flags_resolve(
    script: str,
    world_size: int,
    settings: dict[str, str],
    places: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags_resolve(explanation(script, world_size, places, tmp_path, monkeypatch), settings)


@pytest.mark.parametrize(
    ("script", "further", "settings"),
    [
        ("examples/bert/train_bert_340m_distributed.sh", "", {"data_parallel_size": "8", "kv_channels": "64"}),
        (
            "examples/t5/train_t5_220m_distributed.sh",
            "--encoder-pipeline-model-parallel-size 1 --micro-batch-size 32",
            {"data_parallel_size": "4", "decoder_seq_length": "128", "encoder_seq_length": "512", "kv_channels": "64"},
        ),
        pytest.param(
            "examples/realm/train_ict_distributed.sh",
            "--micro-batch-size 32",
            {"data_parallel_size": "8", "biencoder_projection_dim": "128", "bf16": "True"},
            marks=pytest.mark.slow,  # two programs
        ),
    ],
)
def test_flags_of_word_piece_models_resolve(
    script: str,
    further: str,
    settings: dict[str, str],
    word_piece_places: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [*word_piece_places, *further.split()]
    flags_resolve(explanation(script, 8, places, tmp_path, monkeypatch), settings)


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        pytest.param(
            "800M",
            {"num_layers": "48", "data_parallel_size": "8", "mamba_num_heads": "32"},
            marks=pytest.mark.slow,
        ),
        ("8B", {"num_layers": "56", "tensor_model_parallel_size": "4", "mamba_num_heads": "128"}),
    ],
)
def test_flags_of_hybrids_resolve(
    scale: str, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [str(tmp_path / name) for name in ("checkpoints", "tensorboard", "tokenizer.model", "data_text_document")]
    (tmp_path / "tokenizer.model").touch()
    flags_resolve(explanation("examples/mamba/train.sh", 8, [scale, *places], tmp_path, monkeypatch), settings)


@pytest.mark.parametrize(("scale", "tensor_parallel"), [("800M", 1), ("8B", 4)])
def test_flags_of_the_server_of_hybrids_exist(scale: str, tensor_parallel: int, tmp_path: Path) -> None:
    launched = launch("examples/mamba/run_text_gen_server.sh", tensor_parallel, [scale, "saved", "a.model"], tmp_path)
    program, *flags = launched.stdout.splitlines()
    assert Path(program).exists()
    args = parse_args(add_server_arguments, argv=flags)
    assert (args.tensor_model_parallel_size, args.load) == (tensor_parallel, "saved")


@pytest.mark.parametrize(
    ("script", "arguments", "tensor_parallel"),
    [
        ("run_text_generation_server_345M.sh", ["saved", "vocab.json", "merges.txt"], 1),
        ("run_text_generation_server_345M_8_tensor_parallel.sh", ["saved", "vocab.json", "merges.txt"], 8),
        ("run_text_generation_server_hf.sh", ["llama", "4", "--quantize", "int8"], 4),
        ("run_t5_text_generation_server.sh", ["llama", "2"], 2),
    ],
)
def test_flags_of_servers_exist(script: str, arguments: list[str], tensor_parallel: int, tmp_path: Path) -> None:
    launched = launch(f"examples/inference/{script}", tensor_parallel, arguments, tmp_path)
    program, *flags = launched.stdout.splitlines()
    assert Path(program).exists()
    args = parse_args(add_server_arguments, argv=flags)
    assert args.tensor_model_parallel_size == tensor_parallel and args.load in ("saved", "hf:llama")


def flags_resolve(printed: str, settings: dict[str, str]) -> None:
    explained = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    for name, value in settings.items():
        assert explained[name].removeprefix(name).strip().startswith(f"{value} "), explained[name]


def test_a_layout_that_does_not_fit_is_refused(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="1000"):
        explanation("examples/gpt3/train_gpt3_175b_distributed.sh", 1000, places, tmp_path, monkeypatch)


def test_without_arguments_the_use_is_shown(tmp_path: Path) -> None:
    result = launch("examples/gpt3/train_gpt3_345m.sh", 8, [], tmp_path)
    assert result.returncode == 2
    assert "CHECKPOINTS TENSORBOARD VOCAB.json MERGES.txt DATA_PREFIX" in result.stderr
