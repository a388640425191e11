"""tools/checkpoint/convert.py: the same bits after any chain of conversions, and the same scores in any layout."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import HFFolder, HFState, ModelShape
from megatron.core.export.legacy import nest, rows_of_version, to_legacy_name
from megatron.core.export.meta_llama import weights as meta_weights
from megatron.core.export.partition import cut
from megatron.core.export.rank_files import RankFilesState
from tests.functional_tests.program import ROOT
from tests.interop.hf_models import (
    CASES,
    HEADS,
    SWEPT,
    VOCAB,
    WITH_EXPERTS,
    closeness,
    family_of,
    inputs,
    make,
    our_scores,
    start,
    their_scores,
)
from tests.interop.test_hf_directories import COPIES
from tests.worker_pool import RankFailure, run_ranks
from tools.checkpoint.convert import main


def convert(case: str, loader: str, saver: str, source: Path, out: Path, *options: str) -> Path:
    """Run the tool."""
    words = ["--model-type", family_of(case).upper(), "--loader", loader, "--saver", saver]
    main([*words, "--load-dir", str(source), "--save-dir", str(out), *options])
    return out


def layout(tp: int, pp: int) -> list[str]:
    """Options of the savers."""
    return ["--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory of transformers, scores) of each case, made when it is first asked for."""
    known: dict[str, tuple[Path, list[Tensor]]] = {}

    def get(case: str) -> tuple[Path, list[Tensor]]:
        if case not in known:
            directory = tmp_path_factory.mktemp(case)
            known[case] = directory, their_scores(make(case, directory), inputs(case))
        return known[case]

    return get


def assert_same_bits(directory: Path, out: Path) -> None:
    before, after = load_file(directory / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() - after.keys() <= COPIES
    assert after.keys() <= before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def target(case: str, tp: int, pp: int, ep: int = 1) -> list[str]:
    """A layout that the model fits in format `torch`."""
    experts = ["--target-expert-parallel-size", str(ep)] if case in WITH_EXPERTS else []
    return [*layout(tp, 1 if case == "t5" else pp), *experts]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SWEPT else ()) for case in CASES]
)
def test_a_chain_of_conversions_returns_the_bits(case: str, made: Any, tmp_path: Path) -> None:
    source = made(case)[0]
    loader = "mixtral_hf" if case == "mixtral" else "hf"
    one = convert(case, loader, "core", source, tmp_path / "1", *target(case, 2, 2, 2))
    two = convert(case, "core", "core", one, tmp_path / "2", "--ckpt-format", "torch_dist", *target(case, 1, 1))
    three = convert(
        case,
        "mcore",
        "core",
        two,
        tmp_path / "3",
        *target(case, 4, 1, 4),
        "--saver-transformer-impl",
        "transformer_engine",
    )
    four = convert(case, "core", "core", three, tmp_path / "4", "--ckpt-format", "safetensors", *target(case, 2, 4))
    if case in ("gpt2", "llama", "bert", "megatron-bert"):  # what the older classes have
        four = convert(case, "core", "megatron", four, tmp_path / "5", *layout(2, 2))
    out = convert(case, "legacy", "hf", four, tmp_path / "out")
    assert_same_bits(source, out)


def scores_of(case: str, flags: list[str]) -> list[Tensor] | None:
    return our_scores(start(flags, case), inputs(case))


@pytest.mark.parametrize(
    ("case", "tp", "pp", "ep", "kind"),
    [
        ("llama", 2, 1, 1, "torch"),
        ("gpt2", 1, 2, 1, "torch"),
        ("gpt2", 2, 1, 1, "torch_dist"),
        ("bert", 1, 2, 1, "torch"),
        ("mixtral", 1, 1, 2, "torch"),
        ("qwen3-moe", 1, 2, 1, "torch"),
        ("qwen3-moe", 1, 1, 2, "torch_dist"),
        ("t5", 2, 1, 1, "torch"),
        ("t5", 1, 2, 1, "safetensors"),
    ],
)
def test_what_was_converted_computes_the_same(
    case: str, tp: int, pp: int, ep: int, kind: str, made: Any, tmp_path: Path
) -> None:
    source, expected = made(case)
    sizes = layout(tp, pp) if kind != "torch" else target(case, tp, pp, ep)
    out = convert(case, "hf", "core", source, tmp_path / "out", *sizes, "--ckpt-format", kind)
    flags = ["--load", str(out), "--use-checkpoint-args", "--ckpt-format", kind, "--no-load-optim", "--no-load-rng"]
    flags += ["--tensor-model-parallel-size", str(tp)] + ["--pipeline-model-parallel-size", str(pp)] * (pp > 1)
    flags += ["--expert-model-parallel-size", str(ep)] * (ep > 1)
    results = run_ranks(2, scores_of, case, flags)
    for found, wanted in zip(results[-1] or [], expected, strict=True):
        torch.testing.assert_close(found, wanted, **closeness(case))


# --- older classes --------------------------------------------------------------------------------------

OLDER_NAMES = (
    ("language_model.encoder.", "language_model.transformer."),
    (".self_attention.", ".attention."),
    ("input_norm.", "input_layernorm."),
    ("post_attention_norm.", "post_attention_layernorm."),
    ("final_norm.", "final_layernorm."),
    ("lm_head.norm.", "lm_head.layernorm."),
)


def loss_scaler() -> Any:
    """An object of a class that the reader does not have, as those releases hold one."""
    module = sys.modules.setdefault("fp16.loss_scaler", types.ModuleType("fp16.loss_scaler"))
    sys.modules.setdefault("fp16", types.ModuleType("fp16")).loss_scaler = module  # type: ignore[attr-defined]
    if not hasattr(module, "LossScaler"):
        module.LossScaler = type("LossScaler", (), {"__module__": "fp16.loss_scaler"})  # type: ignore[attr-defined]
    return module.LossScaler()


def write_legacy(source: Path, out: Path, version: float | None, tp: int, *, old: bool) -> None:
    """A checkpoint of exactly the structure of the public 345M releases, or of a later one."""
    state = HFState(HFFolder(source))
    settings = {**state.folder.settings(), "tensor_model_parallel_size": tp, "padded_vocab_size": 104}
    for rank in range(tp):
        flat = {}
        for name in state:
            whole = state.read(name)
            if name in ("embedding.word_embeddings.weight", "output_layer.bias"):
                whole = torch.cat([whole, whole.new_zeros(104 - VOCAB, *whole.shape[1:])])
            part = cut(name, whole, rank, tp, False)
            if ".linear_qkv." in name:
                part = rows_of_version(part, HEADS // tp, version or 0)
            older = to_legacy_name(name)
            for modern, ancient in OLDER_NAMES if old else ():
                older = older.replace(modern, ancient)
            flat[older] = part.clone()
        content = {"model": nest(flat), "args": argparse.Namespace(**settings), "optimizer": {"scaler": loss_scaler()}}
        content |= {} if version is None else {"checkpoint_version": version}
        path = out / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    (out / "latest_checkpointed_iteration.txt").write_text("release")


@pytest.mark.parametrize(("version", "tp"), [(None, 1), (0, 2), (1.0, 2), (2.0, 1), (3.0, 2)])
@pytest.mark.parametrize("case", ["gpt2", "megatron-bert"])
def test_checkpoints_of_the_older_classes(case: str, version: float | None, tp: int, made: Any, tmp_path: Path) -> None:
    source = made(case)[0]
    write_legacy(source, tmp_path / "legacy", version, tp, old=(version or 0) < 2)
    out = convert(case, "legacy", "hf", tmp_path / "legacy", tmp_path / "out", "--true-vocab-size", str(VOCAB))
    assert_same_bits(source, out)


SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 48 --max-position-embeddings 48".split()


def test_training_takes_the_weights_of_the_older_classes(made: Any, tmp_path: Path) -> None:
    """The way of the public releases: convert, then load with the checkpoint's own settings, in another layout."""
    source, expected = made("megatron-bert")
    write_legacy(source, tmp_path / "legacy", None, 1, old=True)
    with pytest.raises(RankFailure, match=r"convert\.py --loader legacy"):
        direct = ["--load", str(tmp_path / "legacy"), "--ckpt-format", "torch", "--finetune"]
        run_ranks(1, scores_of, "megatron-bert", [*direct, *SIZES])
    out = convert("megatron-bert", "legacy", "core", tmp_path / "legacy", tmp_path / "out", *layout(2, 1))
    flags = ["--load", str(out), "--use-checkpoint-args", "--ckpt-format", "torch", "--finetune"]
    results = run_ranks(2, scores_of, "megatron-bert", [*flags, "--tensor-model-parallel-size", "2"])
    for found, wanted in zip(results[-1] or [], expected, strict=True):
        torch.testing.assert_close(found, wanted, **closeness("megatron-bert"))


# --- Meta -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_words", [False, True])
def test_directories_of_meta(by_words: bool, made: Any, tmp_path: Path) -> None:
    source = made("llama")[0]
    state = HFState(HFFolder(source))
    config, shape = state.folder.config, ModelShape.of_settings(state.folder.settings())
    params = {"dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "norm_eps": config["rms_norm_eps"]}
    params["rope_theta"] = config["rope_parameters"]["rope_theta"]
    theirs = {n: t for w in meta_weights(shape) for n, t in zip(w.theirs, w.unpack(state.read(w.ours)))}
    theirs["tok_embeddings.weight"] = theirs["tok_embeddings.weight"][:100]
    theirs["output.weight"] = theirs["output.weight"][:100]
    inner = (".wo.weight", ".w2.weight") + (() if by_words else ("tok_embeddings.weight",))
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    for rank in range(2):
        part = {n: t if t.dim() == 1 else t.chunk(2, int(n.endswith(inner)))[rank].clone() for n, t in theirs.items()}
        torch.save(part, tmp_path / "meta" / f"consolidated.{rank:02d}.pth")
    options = ["--checkpoint-type", "meta", "--model-size", "llama2-7B", "--tokenizer-model", "t.model"]
    convert("llama", "llama_mistral", "hf", tmp_path / "meta", tmp_path / "out", *options)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name][: len(tensor)]) for name, tensor in after.items())


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loader", "llava", "--saver", "core"], "llava is not built yet"),
        (["--loader", "mixtral_hf", "--saver", "core"], "--loader mixtral_hf is for a mixtral, "),
        (["--loader", "hf", "--saver", "core", "--target-expert-parallel-size", "2"], "the model has no experts"),
        (["--loader", "zebra", "--saver", "core"], "choose from core, legacy, llama_mistral, mixtral_hf, hf"),
        (["--loader", "hf", "--saver", "core", *layout(3, 1)], "4 query groups cannot be divided over 3"),
        (["--loader", "hf", "--saver", "core", *layout(1, 3)], "4 layers cannot be divided over 3"),
        (["--loader", "hf", "--saver", "core", "--target-expert-parallel-size", "2"], "experts"),
        (["--loader", "hf", "--saver", "hf", "--hf-model-type", "gpt2"], "no gpt2 since"),
        (["--loader", "core", "--saver", "hf"], "is not a checkpoint"),
    ],
)
def test_refusals(options: list[str], message: str, made: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--model-type", "GPT", "--load-dir", str(made("llama")[0]), "--save-dir", str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert message in f"{end.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()


def test_an_incomplete_set_of_files_is_refused(made: Any, tmp_path: Path) -> None:
    out = convert("gpt2", "hf", "core", made("gpt2")[0], tmp_path / "out", *layout(2, 2))
    (out / "iter_0000001" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointingException, match=r"rank \(0, 0, 1\) missing"):
        RankFilesState(out / "iter_0000001")


# --- memory ---------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, threading, time
from tools.checkpoint.convert import main
import torch._dynamo  # what is imported late would count
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
main(sys.argv[1:]); done = True; thread.join()
print("PEAK", peak - before)
"""


@pytest.mark.slow  # the peak of a process is also the allocator's and the system's matter
@pytest.mark.parametrize(
    ("loader", "saver"),
    [
        ("hf", "torch"),
        ("hf", "torch_dist"),
        ("torch", "hf"),
        ("torch_dist", "hf"),
    ],
)
def test_memory_is_at_most_twice_the_largest_layer(loader: str, saver: str, tmp_path: Path) -> None:
    """A model of 8 layers of 28 MB each: 227 MB go through 57 MB."""
    layers, hidden = 8, 768
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": 8, "vocab_size": 512}
    theirs = {"wte.weight": torch.zeros(512, hidden), "wpe.weight": torch.zeros(64, hidden)}
    shapes = {"attn.c_attn": 3 * hidden, "attn.c_proj": hidden, "mlp.c_fc": 4 * hidden}
    for n in range(layers):
        for name, width in shapes.items():
            theirs |= {f"h.{n}.{name}.weight": torch.zeros(hidden, width), f"h.{n}.{name}.bias": torch.zeros(width)}
        theirs |= {f"h.{n}.mlp.c_proj.weight": torch.zeros(4 * hidden, hidden)}
        theirs |= {f"h.{n}.{name}": torch.zeros(hidden) for name in ("mlp.c_proj.bias", "ln_1.weight", "ln_1.bias")}
        theirs |= {f"h.{n}.ln_2.{kind}": torch.zeros(hidden) for kind in ("weight", "bias")}
    theirs |= {f"ln_f.{kind}": torch.zeros(hidden) for kind in ("weight", "bias")}
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**config, "n_positions": 64, "tie_word_embeddings": True}))
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, source / "model.safetensors")
    layer = 4 * (12 * hidden * hidden + 13 * hidden)
    del theirs
    if loader != "hf":
        convert("gpt2", "hf", "core", source, tmp_path / "own", *layout(2, 2), "--ckpt-format", loader)
        source = tmp_path / "own"
    words = ["--model-type", "GPT", "--loader", "hf" if loader == "hf" else "core", "--load-dir", str(source)]
    words += ["--saver", "hf"] if saver == "hf" else ["--saver", "core", "--ckpt-format", saver, *layout(2, 2)]
    command = [sys.executable, "-c", MEASURE, *words, "--save-dir", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    peak = int(result.stdout.split("PEAK")[1])
    assert peak <= 2 * layer, f"{peak / 1e6:.1f} MB for layers of {layer / 1e6:.1f} MB"
