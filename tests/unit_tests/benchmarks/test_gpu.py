"""`benchmarks/gpu.py` with tiny models: what its gate says, its rows, and what becomes of those that fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_gate, gpu_gate_models, gpu_rows, gpu_transformers
from benchmarks.gpu_transformers import model_of, why_not
from benchmarks.plain_models import PlainModel, scan
from megatron.core import parallel_state
from megatron.core.fusions import compiled
from megatron.core.ssm.ssd import chunked_scan
from megatron.core.transformer import cuda_graphs
from megatron.training.library_configs import core_transformer_config_from_args
from tests.unit_tests.transformer.tape import Tape
from tests.worker_pool import run_ranks


def options(path: Path | None, minutes: float = 5.0) -> Namespace:
    return Namespace(device="cpu", tiny=True, in_process=True, output=path, minutes=minutes)


def run_program(path: Path, rows: tuple[str, ...]) -> bool:
    """The gate and rows on this rank; whether all is right."""
    parallel_state.initialize_model_parallel()
    broken = {"broken": gpu_rows.Work("flags that no program has", "--no-such-flag", "", 60)}
    with mock.patch.object(compiled, "BACKEND", compiled.BACKEND), mock.patch.dict(gpu_rows.ROWS, broken):
        return gpu.Run(options(path)).all(gpu.steps_of([*rows, "broken"]))


SOME = ("gpt_2b", "llama_7b_fp8", "hybrid_1b")


ALL = pytest.param(tuple(gpu_rows.ROWS), marks=pytest.mark.slow)


@pytest.mark.parametrize("rows", [SOME, ALL], ids=["some", "all"])
def test_the_whole_of_it_with_tiny_models(tmp_path: Path, rows: tuple[str, ...]) -> None:
    (right,) = run_ranks(1, run_program, tmp_path / "gpu.json", rows)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert right, [one for one in found["gate"] if not one["passed"]]
    assert found["machine"]["copy_gb_per_second"] > 0
    names = {one["name"] for one in found["gate"]}
    assert {check.name for check in (*gpu_gate.CHECKS, *gpu_gate.SUMS, *gpu_gate.PRODUCTS)} < names and len(
        found["gate"]
    ) > 60
    assert "SystemExit" in found["rows"].pop("broken")["ours"]["said"]
    for name, row in found["rows"].items():
        for contender in ("ours", "plain", "transformers"):
            one = row.get(contender)
            if one is None or one.get("said") == "RuntimeError: transformers is not installed":
                continue
            first, last = one["first_and_last_loss"]
            assert abs(first - math.log(256)) < 0.2 and math.isfinite(last), (name, contender, one)
            assert one["tokens_per_second"] > 0 and "said" not in one
        if gpu_rows.ROWS[name].peer == "plain":
            speeds = [row[contender]["tokens_per_second"] for contender in ("ours", "plain")]
            assert row["ratio"] == speeds[0] / speeds[1]


def sizes_of_models() -> dict[str, tuple[int, int, float]]:
    """Parameters of the small model and of its peer, and billions of the large one, by row."""
    parallel_state.initialize_model_parallel()
    found = {}
    for name, work in gpu_rows.ROWS.items():
        small, large = (gpu_rows.settings_of(work, tiny) for tiny in (True, False))
        ours = gpu_rows.our_model(small, core_transformer_config_from_args(small))
        with torch.device("meta"):
            theirs, full = PlainModel(small), PlainModel(large)
            hugging_face = [model_of(small)] if work.beside_transformers and why_not(small) is None else []
        models = (ours, theirs, full, *hugging_face)
        counts = [sum(param.numel() for param in model.parameters()) for model in models]
        assert counts[3:] in ([], [counts[0]])
        found[name] = (counts[0], counts[1], counts[2] / 1e9)
    return found


def test_peers_are_the_same_models() -> None:
    (found,) = run_ranks(1, sizes_of_models)
    assert all(ours == theirs for ours, theirs, _ in found.values())
    billions = {name: round(size, 1) for name, (_, _, size) in found.items()}
    assert billions["gpt_2b"] == 1.8 and billions["llama_7b"] == 6.7
    assert billions["moe_1b"] == 3.2 and billions["hybrid_1b"] == 0.9


def test_the_recurrence_of_the_peer() -> None:
    x, B, C = (torch.randn(2, 32, 4, width) for width in (8, 6, 6))
    dt, rate = torch.rand(2, 32, 4), torch.rand(4)
    ours, _ = chunked_scan(*(t.transpose(0, 1) for t in (x, dt)), -rate, *(t.transpose(0, 1) for t in (B, C)), 16)
    theirs = scan(x * dt.unsqueeze(-1), -dt * rate, B, C, 8)
    torch.testing.assert_close(theirs, ours.transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_does_not_pass() -> None:
    def tried(ours: Any) -> gpu_gate.Outcome:
        check = gpu_gate.Check("square", ((4, 5),), ours, lambda x: x * x, (torch.float32,))
        return gpu_gate.tried(check, torch.float32, "cpu", 2e-5)

    assert tried(lambda x: x**2).passed
    assert not tried(lambda x: 1.001 * x * x).passed
    assert not tried(lambda x: x.detach() * x).passed  # half the gradient
    failed = tried(lambda x: x @ x)
    assert not failed.passed and failed.said.startswith("RuntimeError: mat1 and mat2")
    instead = gpu_gate.Check("square", ((4, 5),), lambda x: x * x, lambda x: x * x, instead=lambda *_: "by hand")
    outcome = gpu_gate.tried(instead, torch.float32, "cpu", 2e-5)
    assert outcome.passed and outcome.difference is not None and outcome.said == "by hand"
    absent = gpu_gate.Check("none", (), lambda: None, lambda: None, missing=lambda device: f"no {device}")
    outcome = gpu_gate.tried(absent, torch.float32, "cpu", 0.0)
    assert outcome.passed and outcome.said == "missing: no cpu"


def graphs_by(tape: type) -> gpu_gate.Outcome:
    """What the gate says of layers in graphs that `tape` stands for."""
    parallel_state.initialize_model_parallel()
    with mock.patch.object(cuda_graphs, "CudaRecorder", tape):
        return gpu_gate_models.graphs_beside_kernels("cpu")


class Forgetful(Tape):
    """Replays nothing: what lies in its memory is that of the recording."""

    def record(self, work: Any) -> Any:
        return super().record(work)[0], lambda: None


def test_layers_in_graphs_are_compared() -> None:
    assert gpu_gate_models.layers_in_graphs("cpu").said == "missing: graphs of kernels on cpu"
    (right,), (wrong,) = run_ranks(1, graphs_by, Tape), run_ranks(1, graphs_by, Forgetful)
    assert right.passed and right.difference < 1e-6
    assert not wrong.passed and wrong.said == f"pass {gpu_gate_models.WARMUP}"


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_transformers, "find_spec", lambda name: None)
    found = gpu.part("moe_1b", "transformers", "cpu", True, 0.0)
    assert found == {"said": "RuntimeError: transformers is not installed"}


def test_what_matters_most_comes_first() -> None:
    steps = gpu.steps_of(list(gpu_rows.ROWS))
    assert steps[:4] == [("gate", "ours"), ("gpt_2b", "ours"), ("gpt_2b", "plain"), ("llama_7b_recompute", "ours")]
    later = [("moe_1b", "transformers"), ("hybrid_1b", "transformers"), ("llama_7b", "plain")]
    assert steps[-3:] == later and len(set(steps)) == len(steps)
    assert [name for name, contender in steps[1:-3] if contender == "ours"] == list(gpu_rows.ROWS)


def test_no_memory_in_one_row_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, contender: str, *unused: Any) -> dict[str, Any]:
        if (name, contender) == ("llama_7b_recompute", "plain"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity")
        speed = {"ours": 30.0, "plain": 20.0}[contender]
        shares = dict.fromkeys(("mfu_causal_half", "mfu_causal_whole"), 0.5) | {"share_of_matmul_peak": 0.6}
        return {
            "tokens_per_second": speed,
            "seconds_of_step": 1.0,
            "peak_memory_gib": 1.0,
            "seconds_in_all": 9,
        } | shares

    monkeypatch.setattr(gpu, "measured", measured)
    run = gpu.Run(options(tmp_path / "gpu.json"))
    run.all([step for step in gpu.steps_of(["gpt_2b", "llama_7b_recompute", "llama_7b_fp8"]) if step.name != gpu.GATE])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    said = rows["llama_7b_recompute"]["plain"]["said"]
    assert said.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert rows["llama_7b_recompute"]["ours"]["tokens_per_second"] == 30 and rows["llama_7b_recompute"]["ratio"] is None
    assert rows["gpt_2b"]["ratio"] == 1.5 and rows["llama_7b_fp8"]["ratio"] == 1.0
    assert rows["llama_7b_fp8"]["ratio_to_plain"] is None  # the peer of the other row found no memory


# --- a part in a process of its own ---

SAYS = (
    "import sys, time, os, signal; print(flush=True); sys.stdin.readline(); print('answer: {\"n\": 1}', flush=True); "
)


def found_by(code: str, seconds: float = 30.0) -> dict[str, Any]:
    worker = gpu.Worker([sys.executable, "-c", code])
    while worker._process.poll() is None and not os.fstat(worker._said.fileno()).st_size:
        time.sleep(0.02)  # its imports take none of its time
    return worker.run(seconds)


def test_a_part_that_dies_or_hangs_says_so_and_keeps_what_it_has_said() -> None:
    assert found_by(SAYS) == {"n": 1}
    killed = found_by(f"{SAYS} os.kill(os.getpid(), signal.SIGKILL)")
    assert killed == {"n": 1, "said": "the process ended with -9: nothing"}
    assert found_by(f"{SAYS} time.sleep(300)", 3.0) == {"n": 1, "said": "ended after 3 s"}
    raised = found_by("raise RuntimeError('no device')")  # before it is told to begin
    assert raised == {"said": "the process ended with 1: RuntimeError: no device"}
    assert found_by(f"{SAYS} print('answer: {{\"n\":', flush=True)") == {"n": 1}


def test_what_a_part_has_started_does_not_outlive_it(tmp_path: Path) -> None:
    """Compilers hold on to its output, and would keep whoever reads that waiting."""
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'lives')!r}).touch()"
    starts = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    begun = time.monotonic()
    assert found_by(f"{SAYS} {starts}")["n"] == 1
    assert found_by(f"{SAYS} {starts} time.sleep(300)", 1.0)["said"] == "ended after 1 s"
    time.sleep(max(0.0, 4.0 - (time.monotonic() - begun)))
    assert not (tmp_path / "lives").exists()


def test_nothing_is_begun_without_time() -> None:
    run = gpu.Run(options(None, minutes=0))
    assert not run.all(gpu.steps_of(["moe_1b"]))
    for contender in ("ours", "plain", "transformers"):
        assert run.result["rows"]["moe_1b"][contender] == {"said": "not tried: 0 s are left"}
    assert run.result["rows"]["moe_1b"]["ratio"] is None and run.result["gate"][-1]["said"].startswith("not tried")


@pytest.mark.slow
def test_parts_in_processes_of_their_own(tmp_path: Path) -> None:
    program = Path(gpu.__file__)
    command = [sys.executable, str(program), "--device", "cpu", "--tiny", "--output", str(tmp_path / "gpu.json")]
    ended = subprocess.run([*command, "--rows", "gpt_2b"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 wrong" in ended.stdout and "times plain torch, compiled" in ended.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rows"]["gpt_2b"]["ratio_to_plain"] > 0 and found["machine"]["torch"]
