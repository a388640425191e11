"""What the trackers write can be read back: TensorBoard events, a wandb run, JSON lines."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.training.logging.trackers import Trackers, open_trackers


def settings(**changes: Any) -> SimpleNamespace:
    values = {
        "tensorboard_dir": None,
        "tensorboard_queue_size": 10,
        "wandb_project": None,
        "wandb_exp_name": "",
        "wandb_save_dir": None,
        "save": None,
        "metrics_jsonl": None,
        "lr": 1.5e-4,
    }
    return SimpleNamespace(**{**values, **changes})


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_events(tmp_path: Path) -> None:
    trackers = open_trackers(settings(tensorboard_dir=str(tmp_path)))
    trackers.log({"lm loss": 2.5, "batch-size": 8}, 1, 8)
    trackers.log({"lm loss": 2.25, "batch-size": 16}, 2, 24)
    trackers.log({"iteration-time": 0.125}, 2)
    trackers.flush()
    trackers.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {"lm loss", "lm loss vs samples", "batch-size", "batch-size vs samples", "iteration-time"}
    assert set(events.Tags()["scalars"]) == names
    assert scalars(events, "lm loss") == [(1, 2.5), (2, 2.25)]
    assert scalars(events, "lm loss vs samples") == [(8, 2.5), (24, 2.25)]
    assert scalars(events, "batch-size") == [(1, 8.0), (2, 16.0)]
    assert scalars(events, "iteration-time") == [(2, 0.125)]
    (text,) = events.Tensors("lr/text_summary")
    assert text.tensor_proto.string_val == [b"0.00015"]


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_run(tmp_path: Path) -> None:
    args = settings(wandb_project="the-project", wandb_exp_name="the-run", save=str(tmp_path / "save"))
    args.unusual = SimpleNamespace(value=1)
    trackers = open_trackers(args)
    assert trackers.wandb.run.project == "the-project"
    assert trackers.wandb.run.name == "the-run"
    assert trackers.wandb.run.config["lr"] == 1.5e-4
    assert trackers.wandb.run.config["unusual"] == "namespace(value=1)"
    trackers.log({"lm loss": 2.5}, 1, 8)
    trackers.log({"lm loss": 2.25}, 2, 24)
    trackers.close()
    (run,) = (tmp_path / "save" / "wandb").glob("**/offline-run-*/*.wandb")
    words = (b"the-project", b"the-run", b"lm loss", b"2.25", b"samples vs steps")
    deadline = time.monotonic() + 300  # a process of wandb's own writes the file, and finishes a little later
    while time.monotonic() < deadline and not all(word in run.read_bytes() for word in words):
        time.sleep(0.05)
    assert [word for word in words if word not in run.read_bytes()] == []
    assert b"vs samples" not in run.read_bytes()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_disk_at_once_and_continued_by_the_next_job(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    first = open_trackers(settings(metrics_jsonl=str(path)))
    first.record({"iteration": 1, "lm loss": 2.5, "skipped": False})
    assert rows(path) == [{"iteration": 1, "lm loss": 2.5, "skipped": False}]
    first.record({"iteration": 2, "lm loss": 1 / 3, "grad-norm": 1e-300})
    first.close()
    second = open_trackers(settings(metrics_jsonl=str(path)))
    second.record({"iteration": 3})
    second.close()
    assert [row["iteration"] for row in rows(path)] == [1, 2, 3]
    assert rows(path)[1]["lm loss"] == 1 / 3  # at full precision
    assert rows(path)[1]["grad-norm"] == 1e-300


def test_metrics_lie_beside_the_checkpoints_by_default(tmp_path: Path) -> None:
    trackers = open_trackers(settings(save=str(tmp_path)))
    trackers.record({"iteration": 1})
    trackers.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"iteration": 1}]


def test_without_flags_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trackers = open_trackers(settings())
    assert trackers == Trackers(None, None, None)
    trackers.log({"lm loss": 1.0}, 1, 8)
    trackers.record({"iteration": 1})
    trackers.flush()
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("torch.utils.tensorboard", {"tensorboard_dir": "x"}, "--tensorboard-dir needs .* pip install tensorboard"),
        ("wandb", {"wandb_project": "x"}, "--wandb-project needs .* pip install wandb"),
    ],
)
def test_a_missing_package_is_named(
    module: str, flags: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=message):
        open_trackers(settings(**flags))


def test_numbers_that_json_does_not_know_are_null() -> None:
    file = io.StringIO()
    Trackers(metrics=file).record({"iteration": 1, "lm loss": float("nan"), "grad-norm": float("inf"), "lr": 0.5})
    assert json.loads(file.getvalue()) == {"iteration": 1, "lm loss": None, "grad-norm": None, "lr": 0.5}
