"""tools/checkpoint/inspect.py on every kind of checkpoint, and real weights beside transformers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.hf_models import make, start
from tests.interop.test_convert import convert, layout
from tests.real_inputs import real_input
from tests.worker_pool import run_ranks
from tools.checkpoint.inspect import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as a directory of transformers, and in two formats of ours."""
    root = tmp_path_factory.mktemp("model")
    make("qwen3", root / "hf")
    convert("qwen3", "hf", "core", root / "hf", root / "torch", *layout(2, 2))
    convert("qwen3", "core", "core", root / "torch", root / "dist", "--ckpt-format", "torch_dist", *layout(1, 1))
    return {name: root / name for name in ("hf", "torch", "dist")}


def test_ls(folders: dict[str, Path], capsys: Any) -> None:
    assert main(["ls", str(folders["dist"]), "--filter", "linear_fc1.weight"]) == 0
    printed = capsys.readouterr().out
    assert "format torch_dist, iteration 1" in printed
    assert "num_query_groups = 4" in printed
    assert "decoder.layers.mlp.linear_fc1.weight" in printed
    assert "[4, 192, 64]" in printed
    assert "embedding.word_embeddings" not in printed
    assert main(["ls", str(folders["torch"])]) == 0
    assert "decoder.layers.3.self_attention.q_layernorm.weight" in capsys.readouterr().out
    assert main(["ls", str(folders["hf"])]) == 1  # hf: is missing


def test_diff(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["diff", str(folders["dist"]), f"hf:{folders['hf']}"]) == 1
    assert "embedding.word_embeddings.weight: shape [128, 64] against [101, 64]" in capsys.readouterr().out
    assert main(["diff", str(folders["dist"]), str(folders["dist"])]) == 0
    make("qwen3", tmp_path)
    assert main(["diff", f"hf:{tmp_path}", f"hf:{folders['hf']}"]) == 0
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-2] ^= 0x40
    (tmp_path / "model.safetensors").write_bytes(data)
    capsys.readouterr()
    assert main(["diff", f"hf:{tmp_path}", f"hf:{folders['hf']}"]) == 1
    assert "1 of " in capsys.readouterr().out


def test_verify(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    out = convert("qwen3", "hf", "core", folders["hf"], tmp_path / "out", *layout(1, 2))
    assert main(["verify", str(out)]) == 0
    file = next(out.glob("iter_*/mp_rank_00_001/*.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(out)]) == 1
    assert "its checksum is not the one of what was written" in capsys.readouterr().out


def verified(checkpoint: str, directory: Path) -> tuple[int, str]:
    """Status and output of the program; on a rank of the pool, since it makes process groups."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(["verify", checkpoint, "--against-hf", str(directory)])
    return status, printed.getvalue()


def test_verify_against_hf(folders: dict[str, Path], tmp_path: Path) -> None:
    """Right weights pass; the same weights with another base of the rotary angles do not."""
    [(status, printed)] = run_ranks(1, verified, str(folders["torch"]), folders["hf"])
    assert status == 0 and "OK: logits" in printed, printed
    config = json.loads((folders["hf"] / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folders["hf"] / "model.safetensors")
    [(status, printed)] = run_ranks(1, verified, str(folders["torch"]), tmp_path)
    assert status == 1 and "DIFFERENT: logits" in printed, printed


@pytest.mark.parametrize("case", ["mixtral", "t5"])
def test_verify_kinds_against_hf(case: str, tmp_path: Path) -> None:
    make(case, tmp_path / "hf")
    convert(case, "hf", "core", tmp_path / "hf", tmp_path / "own", *layout(2, 1))
    [(status, printed)] = run_ranks(1, verified, str(tmp_path / "own"), tmp_path / "hf")
    assert status == 0 and "OK: logits" in printed, printed


# --- real weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A distilled BERT of 6 layers, as published."""
    files = [real_input(f"minilm/{name}") for name in ("config.json", "tokenizer.json", "model.safetensors")]
    return Path(files[0]).parent


def hidden_states(directory: Path, ids: list[list[int]], flags: list[str]) -> torch.Tensor | None:
    """What our encoder makes of tokens, [b, s, h], on the last stage."""
    [model] = start(["--load", f"hf:{directory}", "--vocab-size", "30521", *flags], "bert")
    hidden: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    tokens = torch.tensor(ids)
    with torch.no_grad():
        model(tokens, torch.ones_like(tokens), tokentype_ids=torch.zeros_like(tokens))
    return hidden[0].transpose(0, 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_real_bert(tp: int, minilm: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    sentences = ["The whale swam past the ship at dawn.", "A checkpoint that cannot be loaded is no checkpoint."]
    ids = AutoTokenizer.from_pretrained(minilm)(sentences, padding=True)["input_ids"]
    width = min(len(row) for row in ids)
    ids = [row[:width] for row in ids]
    with torch.no_grad():
        expected = BertModel.from_pretrained(minilm).eval()(torch.tensor(ids)).last_hidden_state
    for found in run_ranks(tp, hidden_states, minilm, ids, ["--tensor-model-parallel-size", str(tp)]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_real_bert_through_conversions(minilm: Path, tmp_path: Path) -> None:
    own = convert("bert", "hf", "core", minilm, tmp_path / "own", *layout(2, 3))
    out = convert("bert", "core", "hf", own, tmp_path / "out")
    before, after = load_file(minilm / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name.removeprefix("bert.") for name in after} == before.keys() - {"embeddings.position_ids"}
    assert all(torch.equal(tensor, before[name.removeprefix("bert.")]) for name, tensor in after.items())
