"""Directories of transformers through our model and back: equal scores, and the same bits, in every layout."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.core.export import HFFolder, HFState, ModelShape, family_of_settings, write_hf_folder
from tests.functional_tests.program import run_program
from tests.interop import hf_models
from tests.interop.hf_models import CASES, SWEPT, closeness, inputs, make, our_scores, start, their_scores
from tests.worker_pool import run_ranks

COPIES = {"cls.predictions.decoder.bias", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
"""Tensors that they store twice."""
LAYOUTS = {
    "TP1": [],
    "TP2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
}

AGREEMENTS = [
    pytest.param(case, layout, marks=pytest.mark.slow if case in SWEPT and layout != "TP1" else ())
    for case in CASES
    for layout in LAYOUTS
]


def through_ours(case: str, flags: list[str], directory: Path, out: Path) -> list[Tensor] | None:
    """Scores of our model with a directory's weights, which are then written to `out`."""
    from megatron.training import get_args, get_tokenizer
    from megatron.training.checkpoint.hf import save_hf

    model = start(["--load", f"hf:{directory}", "--save-hf", str(out), *flags], case)
    scores = our_scores(model, inputs(case))
    with contextlib.redirect_stdout(io.StringIO()):
        save_hf(get_args(), model, get_tokenizer())
    return scores


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, scores) of each case, made when it is first asked for."""
    known: dict[str, tuple[Path, list[Tensor]]] = {}

    def get(case: str) -> tuple[Path, list[Tensor]]:
        if case not in known:
            directory = tmp_path_factory.mktemp(case)
            known[case] = directory, their_scores(make(case, directory), inputs(case))
        return known[case]

    return get


@pytest.mark.parametrize(("case", "layout"), AGREEMENTS)
def test_scores_agree_and_the_bits_return(case: str, layout: str, made: Any, tmp_path: Path) -> None:
    check_scores_and_bits(case, LAYOUTS[layout], 1 if layout == "TP1" else 2, made, tmp_path)


EXPERTS = {
    "one after the other": "--expert-model-parallel-size 2",
    "stacked": "--expert-model-parallel-size 2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall",
    "whole ones": "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    "--expert-model-parallel-size 2",
}


@pytest.mark.parametrize("how", EXPERTS)
def test_experts_on_several_ranks(how: str, made: Any, tmp_path: Path) -> None:
    check_scores_and_bits("mixtral", EXPERTS[how].split(), 2, made, tmp_path)


def check_scores_and_bits(case: str, flags: list[str], size: int, made: Any, tmp_path: Path) -> None:
    """The same scores with these flags, and the same bits when the model is written again."""
    directory, expected = made(case)
    results = run_ranks(size, through_ours, case, flags, directory, tmp_path / "out")
    assert results[-1] is not None
    for found, wanted in zip(results[-1], expected, strict=True):
        torch.testing.assert_close(found, wanted, **closeness(case))
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() - after.keys() <= COPIES
    assert after.keys() <= before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model_class = type(hf_models.transformers.AutoConfig.from_pretrained(directory))
    again = hf_models.transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(again) is model_class


@pytest.mark.parametrize("case", ["gpt2", "qwen3", "llama-yarn", "bert", "mixtral", "t5"])
def test_what_we_wrote_computes_the_same_there(case: str, made: Any, tmp_path: Path) -> None:
    directory, expected = made(case)
    run_ranks(1, through_ours, case, [], directory, tmp_path / "out")
    their_class = getattr(hf_models.transformers, HFFolder(tmp_path / "out").config["architectures"][0])
    again = their_class.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    for found, wanted in zip(their_scores(again, inputs(case)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def edit_config(directory: Path, out: Path, **changes: Any) -> Path:
    """A copy of a directory with another config.json."""
    out.mkdir()
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").symlink_to(directory / "model.safetensors")
    return out


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "activation": ({"hidden_act": "relu"}, [], "hidden_act is 'relu'"),
    "family": ({"model_type": "gemma"}, [], "model_type 'gemma' is not known"),
    "positions": ({"rope_parameters": {"rope_type": "longrope"}}, [], "longrope"),
    "size": ({}, ["--hidden-size", "32"], "--hidden-size is 32 here and 64 there"),
    "norm": ({}, ["--norm-epsilon", "1e-6"], "--norm-epsilon is 1e-06 here and 1e-05 there"),
    "biases": ({"attention_bias": True}, [], "attention_bias True with mlp_bias False"),
    "missing": ({"num_hidden_layers": 5}, [], r"lacks 9 tensors: model\.layers\.4\."),
    "shape": ({"intermediate_size": 64}, [], "mlp.*shape"),
    "folder": ({}, ["--save-hf", "/"], "is no directory of transformers"),
    "kind": ({}, ["--save-hf", "x", "--hf-model-type", "qwen3"], "qk_layernorm is not set"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_the_same_model_is_refused(what: str, made: Any, tmp_path: Path) -> None:
    changes, flags, message = REFUSED[what]
    directory = edit_config(made("llama")[0], tmp_path / "edited", **changes)
    [text] = run_ranks(1, refusal, ["--load", f"hf:{directory}", *flags])
    assert re.search(message, text), text


def refusal(flags: list[str]) -> str:
    """What starting with these flags says before it ends."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            start(flags, "llama")
    except (SystemExit, Exception) as error:
        return f"{printed.getvalue()}{error}"
    return "nothing"


def test_large_models_become_several_files(made: Any, tmp_path: Path) -> None:
    folder = HFFolder(made("llama")[0])
    state, shape = HFState(folder), ModelShape.of_settings(folder.settings())
    write_hf_folder(tmp_path / "out", state, folder.family, shape, folder.config, shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    again = HFFolder(tmp_path / "out")
    assert set(again) == set(folder)
    assert all(torch.equal(again.read(name), folder.read(name)) for name in folder)
    files[1].unlink()
    with pytest.raises(Exception, match=f"{files[1].name} missing"):
        HFFolder(tmp_path / "out")


def test_pickled_weights_are_read_without_running_anything(made: Any, tmp_path: Path) -> None:
    folder = HFFolder(made("gpt2")[0])
    (tmp_path / "config.json").write_text(json.dumps(folder.config))
    torch.save({name: folder.read(name) for name in folder}, tmp_path / "pytorch_model.bin")
    again = HFFolder(tmp_path)
    assert all(torch.equal(again.read(name), folder.read(name)) for name in folder)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(Exception, match="cannot be read"):
        HFFolder(tmp_path)


def test_damaged_files_are_named(made: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Exception, match="is no JSON"):
        HFFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HFFolder(made("gpt2")[0]).config))
    save_file({"x": torch.zeros(9)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(Exception, match="x lies at"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_settings_return(case: str, made: Any) -> None:
    folder = HFFolder(made(case)[0])
    settings = {"model_family": folder.family.our_type, **folder.settings()}
    assert folder.family.config(settings, 101)["vocab_size"] == 101
    family = family_of_settings(settings)
    assert family.settings(family.config(settings, 101)) == {**folder.settings(), **family.fixed}


def test_the_program_trains_what_it_loaded_and_writes_it(made: Any, tmp_path: Path) -> None:
    """With a learning rate of 0 training changes nothing, so the bits return through optimizer and checkpoint too."""
    directory, out = made("qwen3")[0], tmp_path / "out"
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--mock-data", "--seq-length", "32"]
    words += "--micro-batch-size 1 --global-batch-size 2 --num-workers 0 --eval-iters 0 --no-progress-bar".split()
    words += "--lr 0 --train-iters 1 --use-distributed-optimizer --tensor-model-parallel-size 2".split()
    words += ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    run_ranks(2, run_program, "pretrain_gpt.py", [*words, "--load", f"hf:{directory}"])
    words += ["--load", str(tmp_path / "run"), "--use-checkpoint-args", "--save-hf", str(out)]
    words += "--train-iters 2 --override-opt_param-scheduler".split()
    run_ranks(2, run_program, "pretrain_gpt.py", words)
    before, after = load_file(directory / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
