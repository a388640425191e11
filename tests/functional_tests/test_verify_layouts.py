"""tools/verify_layouts.py end to end: what holds, what does not, and what it refuses."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pretrain_bert
from megatron.training.verify.measure import Measurement, Samples
from megatron.training.verify.shrink import shrink
from megatron.training.verify.verify import verify
from tests.functional_tests.equivalence.layouts import run_here
from tests.functional_tests.program import ROOT
from tests.worker_pool import run_ranks

MODEL = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-4 --data-path corpus "
)


def in_the_pool(mutation: str | None = None, program: str = "pretrain_gpt") -> Any:
    """A runner on the workers of the tests."""

    def run(ranks: int, words: list[str], samples: Samples, options: dict[str, Any]) -> Measurement:
        planted = {"program": program} | ({"mutation": mutation} if ranks > 1 else {})
        found: Measurement = run_ranks(ranks, run_here, words, samples.uneven, options | planted)[0]
        return found

    return run


LAYOUTS = {
    "tensor and sequence": "--tensor-model-parallel-size 2 --sequence-parallel --swiglu --normalization RMSNorm",
    "pipeline": "--pipeline-model-parallel-size 2 --reset-attention-mask --reset-position-ids --eod-mask-loss",
    "context, per token": "--context-parallel-size 2 --calculate-per-token-loss --position-embedding-type rope",
    "bf16, sharded": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16",
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts_that_hold(name: str) -> None:
    verdict = verify(shrink((MODEL + LAYOUTS[name]).split(), 2, steps=3), in_the_pool())
    assert verdict.holds, [line for comparison in verdict.comparisons for line in comparison.lines()]
    assert [one.precision for one in verdict.comparisons] == (["float32", "bf16"] if "bf16" in name else ["float32"])


def test_a_layout_of_bert_holds() -> None:
    flags = MODEL + "--tensor-model-parallel-size 2 --sequence-parallel --mask-prob 0.2 --bert-no-binary-head"
    command = shrink(flags.split(), 2, 3, pretrain_bert.args_defaults)
    found = verify(command, in_the_pool(program="pretrain_bert"))
    assert found.holds, [line for comparison in found.comparisons for line in comparison.lines()]


def test_a_planted_mistake_is_found_and_its_parameter_named() -> None:
    command = shrink((MODEL + LAYOUTS["tensor and sequence"]).split(), 2, steps=3)
    verdict = verify(command, in_the_pool("gradients of sequence-parallel norms are not summed"))
    assert not verdict.holds
    (comparison,) = verdict.comparisons
    assert any("gradients" in line and "VIOLATED" in line and "layernorm" in line for line in comparison.lines())


# --- the program itself: it starts its own ranks ---


def run_tool(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "verify_layouts.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_program_with_a_mistake_of_its_own(tmp_path: Path) -> None:
    """A loss that each replica divides by the tokens of a whole batch is right on one process only."""
    program = tmp_path / "pretrain_mine.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import pretrain_gpt\n"
        "from megatron.core import parallel_state\n"
        "from pretrain_gpt import model_provider\n"
        "def forward_step(data, model):\n"
        "    output, loss_func = pretrain_gpt.forward_step(data, model)\n"
        "    share = parallel_state.get_data_parallel_world_size()\n"
        "    def wrong(tensor):\n"
        "        loss, tokens, report = loss_func(tensor)\n"
        "        return loss / share, tokens, report\n"
        "    return output, wrong\n"
    )
    result = tmp_path / "result.json"
    own = ["--nproc", "2", "--steps", "2", "--json", str(result), "--program", str(program)]
    done = run_tool(*own, "--", *MODEL.split())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the layout computes something else" in done.stdout
    found = json.loads(result.read_text())
    violated = {d["quantity"] for d in found["comparisons"]["float32"] if d["violated"]}
    assert {"gradients", "gradient norm"} <= violated
    assert "loss" not in {
        d["quantity"] for d in found["comparisons"]["float32"] if d["violated"] and "step 1" in d["where"]
    }
    assert not found["holds"] and found["ranks"] == 2


@pytest.mark.slow
def test_program_that_holds() -> None:
    done = run_tool("--steps", "2", "--", *MODEL.split(), "--tensor-model-parallel-size", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--num-layers 24 -> 2" in done.stdout
    assert "the layout computes what one process computes" in done.stdout
    assert "VIOLATED" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", *MODEL.split()], "there is no layout to verify"),
        (["--nproc", "2", "--", *MODEL.split(), "--data-parallel-random-init"], "no one process computes the same"),
        (["--program", "nowhere.py", "--", *MODEL.split()], "there is no such Python file"),
    ],
)
def test_refusals(words: list[str], message: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_layouts.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "verify_layouts.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err
