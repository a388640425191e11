"""The server where something is wrong: what it refuses to start with, and what its clients hear when a rank dies."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.fresh_ranks import End, run_to_the_end
from tests.functional_tests.program import ROOT, TINY, run_program
from tests.functional_tests.test_rank_death import STOPPED
from tests.worker_pool import RankFailure, run_ranks

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SERVER = "tools/run_text_generation_server.py"
FLAGS = [*TINY, "--port", "0", "--cache-gb", "0.01"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model of the tests, after one step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_ranks(
        1, run_program, "pretrain_gpt.py", [*TINY, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
    )
    return folder


def start(argv: list[str]) -> None:
    """The server, up to where it would serve."""
    from megatron.inference.serving.loop import EngineLoop

    with mock.patch.object(EngineLoop, "run", side_effect=AssertionError("it serves")):
        run_program(SERVER, argv)


def wrong(folder: Path, *flags: str) -> str:
    """Why the server does not start."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(1, start, [*FLAGS, "--load", str(folder), *flags])
    assert "it serves" not in str(failure.value)
    return str(failure.value)


def test_a_port_in_use_is_told_before_the_model_is_built(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = wrong(checkpoint, "--port", port)
    assert f"--host 127.0.0.1 --port {port} cannot be listened on: Address already in use" in said
    assert "number of parameters" not in said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--load", "nowhere"], "nowhere"),
        (["--port", "70000"], "--port (70000)"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--vocab-size", "200", "--use-checkpoint-args"], "not the tokenizer that the model was trained with"),
        (["--hidden-size", "64"], "hidden"),
        (["--num-layers", "6"], "decoder.layers"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--max-running", "0"], "--max-running"),
        (["--cache-gb", "nan"], "--cache-gb"),
        (["--cache-gb", "1e-9"], "GiB or more"),
        (["--temperature", "0"], "--temperature 0.0: no call could be answered"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_told(checkpoint: Path, flags: list[str], words: str) -> None:
    assert words in wrong(checkpoint, *flags)


def test_parameters_that_no_checkpoint_filled_are_not_served(checkpoint: Path) -> None:
    assert "q_layernorm.weight: not in the checkpoint" in wrong(checkpoint, "--qk-layernorm")
    assert "random numbers" in wrong(checkpoint, "--qk-layernorm", "--dist-ckpt-strictness", "log_all")


def test_a_model_without_a_checkpoint_is_not_served() -> None:
    with pytest.raises(RankFailure, match="--load"):
        run_ranks(1, start, FLAGS)


def serve_until_death(folder: str, victim: int, tp: int) -> None:
    """The server on two ranks, of which one is killed in its third pass."""
    from megatron.core.inference.engines import DynamicInferenceEngine

    original, passes = DynamicInferenceEngine.step, 0

    def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(engine, *args, **kwargs)

    DynamicInferenceEngine.step = step  # type: ignore[method-assign]
    sys.argv = [SERVER, *FLAGS, "--load", folder, "--tensor-model-parallel-size", str(tp)]
    runpy.run_path(str(ROOT / SERVER), run_name="__main__")


def address_in(path: Path, thread: threading.Thread) -> str:
    """Where the server says that it listens."""
    while True:
        found = re.search(r"serving \S+ at (http://\S+)", path.read_text() if path.exists() else "")
        if found:
            return found[1]
        assert thread.is_alive(), path.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("tp", [2, 1], ids=["a half of the model", "a copy of the model"])
def test_clients_hear_that_a_rank_has_died(tmp_path: Path, checkpoint: Path, tp: int) -> None:
    ends: list[End] = []
    thread = threading.Thread(
        target=lambda: ends.extend(run_to_the_end(tmp_path, 2, serve_until_death, str(checkpoint), 1, tp))
    )
    thread.start()
    address = address_in(tmp_path / "rank0", thread)
    body = json.dumps({"prompts": ["1 2 3"] * 2, "tokens_to_generate": 20}).encode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}/api", body, method="PUT"))
    assert refused.value.code == 503
    assert json.load(refused.value) == "the model has stopped working; the server's log says why"
    thread.join()
    assert ends[1].code == -signal.SIGKILL and ends[0].code == 1
    found = STOPPED.search(ends[0].said)
    assert found is not None and found[2] == "1" and "Traceback" not in ends[0].said, ends[0].said[-3000:]
