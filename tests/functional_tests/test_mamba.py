"""Mamba and hybrid models through the program: every layout gives one process's numbers, and any other's checkpoint."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.training.verify.compare import violations
from megatron.training.verify.measure import Measurement, Samples
from megatron.training.verify.shrink import shrink
from megatron.training.verify.verify import verify
from tests.functional_tests.equivalence.layouts import run_here
from tests.functional_tests.program import ROOT, TINY, run_program, train_rows
from tests.worker_pool import RankFailure, run_ranks

SPEC = "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec --is-hybrid-model"
MODEL = f"""--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-4 --data-path corpus --normalization RMSNorm
    --swiglu --disable-bias-linear --position-embedding-type none --untie-embeddings-and-output-weights {SPEC} """
HYBRID = "--hybrid-override-pattern M*-MM*-M "
DEFAULTS = {"model_family": "mamba"}

LAYOUTS = {
    "tensor, sequence and context": HYBRID + "--tensor-model-parallel-size 2 --sequence-parallel "
    "--context-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "pipeline and sharded optimizer": HYBRID + "--pipeline-model-parallel-size 2 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather",
    "context ranks that share a group": HYBRID + "--context-parallel-size 2 --mamba-num-groups 1",
    "experts": "--hybrid-override-pattern ME-*ME-* --num-experts 4 --expert-model-parallel-size 2 "
    "--tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall",
    "a stage without experts": "--hybrid-override-pattern M*-MME*E --num-experts 4 --pipeline-model-parallel-size 2 "
    "--use-distributed-optimizer",
}
RANKS = {"pipeline and sharded optimizer": 4}
SLOW_LAYOUTS = {
    "a stage without experts, whole optimizer": "--hybrid-override-pattern ME*EMM*- --num-experts 4 "
    "--pipeline-model-parallel-size 2 --bf16",
    "a stage that ends with attention, parts recomputed": "--hybrid-override-pattern M-M*-MM- "
    "--pipeline-model-parallel-size 2 --recompute-granularity selective --recompute-modules mlp layernorm",
    "tensor": HYBRID + "--tensor-model-parallel-size 2",
    "tensor 4": HYBRID + "--tensor-model-parallel-size 4 --sequence-parallel",
    "context 4": HYBRID + "--context-parallel-size 4",
    "two context ranks to a group": HYBRID + "--context-parallel-size 4 --mamba-num-groups 2 --mamba-num-heads 8",
    "context, all-to-all, per token": HYBRID
    + "--context-parallel-size 2 --cp-comm-type a2a --calculate-per-token-loss",
    "pipeline": HYBRID + "--pipeline-model-parallel-size 2",
    "pipeline, interleaved": HYBRID + "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "pipeline, zero bubbles": "--pipeline-model-parallel-size 2 --pipeline-schedule zb-h1",
    "all at once": HYBRID + "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 "
    "--pipeline-model-parallel-size 2",
    "fully sharded": HYBRID + "--use-torch-fsdp2 --no-gradient-accumulation-fusion",
    "parts recomputed": HYBRID + "--recompute-granularity selective --recompute-modules core_attn mlp layernorm "
    "--tensor-model-parallel-size 2",
    "only state space layers": "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    "stored instead of recomputed": HYBRID + "--disable-mamba-mem-eff-path --tensor-model-parallel-size 2",
    "bf16": HYBRID + "--bf16 --tensor-model-parallel-size 2 --sequence-parallel",
    "rotary positions": HYBRID.replace("none", "rope") + "--context-parallel-size 2",
    "experts over context ranks": "--hybrid-override-pattern ME-*ME-* --num-experts 4 --expert-model-parallel-size 2 "
    "--context-parallel-size 2 --moe-grouped-gemm",
}
SLOW_RANKS = {"fully sharded": 2}


def in_the_pool(mutation: str | None = None) -> Any:
    """A runner on the workers of the tests."""

    def run(ranks: int, words: list[str], samples: Samples, options: dict[str, Any]) -> Measurement:
        planted = {"mutation": mutation} if ranks > 1 else {}
        program = {"program": "pretrain_mamba"}
        found: Measurement = run_ranks(ranks, run_here, words, samples.uneven, options | planted | program)[0]
        return found

    return run


def assert_holds(flags: str, ranks: int | None, steps: int = 3) -> None:
    verdict = verify(shrink((MODEL + flags).split(), ranks, steps, DEFAULTS), in_the_pool())
    assert verdict.holds, [line for comparison in verdict.comparisons for line in comparison.lines()]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts_that_hold(name: str) -> None:
    assert_holds(LAYOUTS[name], RANKS.get(name), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW_LAYOUTS))
def test_further_layouts_that_hold(name: str) -> None:
    assert_holds(SLOW_LAYOUTS[name], SLOW_RANKS.get(name))


MISTAKES = {
    "z, x, B, C and dt are cut as one matrix": ("--tensor-model-parallel-size 2", "initial weights"),
    "the convolution has the filters of another context rank": ("--context-parallel-size 2", "loss"),
    "context ranks take the decays of the first one": ("--context-parallel-size 2", "loss"),
    "a context rank keeps its tokens in zigzag": ("--context-parallel-size 2", "loss"),
    "states are not carried from chunk to chunk": ("--tensor-model-parallel-size 2", "loss"),
    "the gradient of the decays forgets what they divide": ("--tensor-model-parallel-size 2", "gradients"),
    "a hybrid's stage takes the layers of the first one": ("--pipeline-model-parallel-size 2", "initial weights"),
    "the norm of the gated output is over all groups of a rank": ("--tensor-model-parallel-size 2", "loss"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_planted_mistake_is_noticed(name: str) -> None:
    layout, noticed_by = MISTAKES[name]
    command = shrink((MODEL + HYBRID + layout).split(), None, 1, DEFAULTS)
    try:
        verdict = verify(command, in_the_pool(name))
        found = [str(d) for one in verdict.comparisons for d in violations(one.deviations)]
    except RankFailure as failure:
        found = [str(failure)]
    assert any(noticed_by in text for text in found), found


TRAINED = f"""{SPEC} --hybrid-override-pattern M*-M --mamba-head-dim 8 --mamba-num-groups 4 --mamba-state-dim 8
    --normalization RMSNorm --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --train-iters 4 --seed 3
    --position-embedding-type none --use-distributed-optimizer"""
CONTINUED = {"--pipeline-model-parallel-size 2 --context-parallel-size 2": 4}
SLOWLY_CONTINUED = {"--tensor-model-parallel-size 4 --sequence-parallel": 4, "": 1}


def train(ranks: int, flags: str, trained: str = TRAINED) -> None:
    run_ranks(ranks, run_program, "pretrain_mamba.py", [*TINY, *trained.split(), *flags.split()])


def rows(path: Path) -> list[tuple[float, float]]:
    return [(row["lm loss"], row["grad-norm"]) for row in train_rows(path)]


def test_another_layout_goes_on_where_one_stopped(tmp_path: Path) -> None:
    goes_on(tmp_path, CONTINUED)


@pytest.mark.slow
def test_any_layout_goes_on_where_one_stopped(tmp_path: Path) -> None:
    goes_on(tmp_path, SLOWLY_CONTINUED)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded optimizer", "whole optimizer"])
def test_experts_of_some_stages_go_on_in_one(tmp_path: Path, sharded: bool) -> None:
    """The rank that writes what ranks have in common has no expert, and counts their steps all the same."""
    trained = TRAINED if sharded else TRAINED.replace("--use-distributed-optimizer", "")
    experts = "--hybrid-override-pattern M*ME --num-experts 4"
    train(1, f"{experts} --metrics-jsonl {tmp_path / 'alone'}", trained)
    saved = f"--save {tmp_path / 'saved'} --save-interval 2 --exit-interval 2"
    train(2, f"{experts} --pipeline-model-parallel-size 2 {saved}", trained)
    train(1, f"{experts} --metrics-jsonl {tmp_path / 'later'} --load {tmp_path / 'saved'}", trained)
    assert rows(tmp_path / "later") == [pytest.approx(row, rel=1e-5) for row in rows(tmp_path / "alone")[2:]]


def goes_on(tmp_path: Path, layouts: dict[str, int]) -> None:
    """Projection and convolution, of which each rank has parts of parts, and the optimizer's state of them."""
    train(1, f"--metrics-jsonl {tmp_path / 'alone'}")
    expected = rows(tmp_path / "alone")
    saved = tmp_path / "checkpoints"
    train(
        2,
        f"--tensor-model-parallel-size 2 --metrics-jsonl {tmp_path / 'first'} --save {saved} --save-interval 2 "
        "--exit-interval 2",
    )
    assert rows(tmp_path / "first") == [pytest.approx(row, rel=1e-5) for row in expected[:2]]
    for i, (layout, ranks) in enumerate(layouts.items()):
        train(ranks, f"{layout} --metrics-jsonl {tmp_path / str(i)} --load {saved}")
        assert rows(tmp_path / str(i)) == [pytest.approx(row, rel=1e-5) for row in expected[2:]]


REFUSED = {
    "--hybrid-override-pattern M*-": "has 3 symbols for --num-layers (4); 'M*-M' has as many",
    "--hybrid-override-pattern M*XM": "has 'X'; it is made of M state space",
    "--hybrid-attention-ratio 0.75 --hybrid-mlp-ratio 0.5": "--hybrid-mlp-ratio can be at most 0.25",
    "--hybrid-attention-ratio 1.25": "is a share of all layers, from 0 to 1",
    "--mamba-head-dim 48": "64 must be divisible by --mamba-head-dim (48)",
    "--mamba-head-dim 8 --mamba-num-groups 3": "must be divisible by --mamba-num-groups (3)",
    "--hybrid-override-pattern ME-M": "needs --num-experts",
    "--num-experts 2": "write E for those that are",
    "--mamba-head-dim 8 --mamba-num-groups 1 --tensor-model-parallel-size 2": "the 1 groups of a mixer",
    "--mamba-head-dim 8 --mamba-num-groups 4 --reset-attention-mask": "isolates the documents of a sample",
}


@pytest.mark.parametrize("flags", list(REFUSED))
def test_what_does_not_fit_is_refused_before_anything_starts(flags: str) -> None:
    message = refusal([*TINY, *SPEC.split(), *flags.split(), "--train-iters", "1"])
    assert REFUSED[flags] in message, message


def test_the_spec_is_needed() -> None:
    assert "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec" in refusal(
        [*TINY, "--train-iters", "1"]
    )


def refusal(argv: list[str]) -> str:
    """What the rules say to a command line, with as many ranks as it needs."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.settings import ConfigurationError, Source

    args = parse_args(argv=argv)
    args.put("world_size", args.tensor_model_parallel_size, Source("flag", "--nproc"))
    with pytest.raises(ConfigurationError) as refused:
        validate_args(args, DEFAULTS)
    return str(refused.value)


@pytest.mark.slow
def test_a_directory_of_transformers_there_and_back(tmp_path: Path) -> None:
    """Trained in one layout, written for transformers, read in another one, and written again as it was."""
    only_mamba = "--hybrid-override-pattern MMMM --mamba-num-heads 8"
    train(2, f"{only_mamba} --tensor-model-parallel-size 2 --exit-interval 2 --save-hf {tmp_path / 'first'}")
    loaded = f"{only_mamba} --num-attention-heads 8 --load hf:{tmp_path / 'first'} --lr 0 --min-lr 0 --weight-decay 0"
    train(2, f"{loaded} --pipeline-model-parallel-size 2 --exit-interval 1 --save-hf {tmp_path / 'second'}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_server_writes_what_the_tool_writes(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    train(1, f"--exit-interval 2 --save {tmp_path} --save-interval 2")
    words = [*SPEC.split(), "--load", str(tmp_path), "--use-checkpoint-args"]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "60"]
    length = ["--prompts", "3 1 4 1 5", "--num-tokens-to-generate", "9"]
    told = subprocess.run(
        [sys.executable, "tools/generate_text.py", "--model-provider", "mamba", *words, *length],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    server = subprocess.Popen(
        [sys.executable, "tools/run_mamba_text_generation_server.py", *words, "--port", "0", "--cache-gb", "0.01"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = next(found[1] for line in server.stdout if (found := re.search(r"serving \S+ at (http://\S+)", line)))
        body = json.dumps({"prompts": ["3 1 4 1 5"], "tokens_to_generate": 9, "top_k": 1}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{address}/api", body, method="PUT")) as answer:
            (text,) = json.load(answer)["text"]
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert f"\n{text.removesuffix(' 60')}\n" in told.stdout  # the tool leaves the end of the document out
