"""Several models vote with their probabilities."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
ONE = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
OTHER = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.9, 0.1]])


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    folders = []
    for name, probabilities in (("one", ONE), ("other", OTHER)):
        (tmp_path / name).mkdir()
        contents = [("dev", (probabilities, torch.tensor([0, 1, 1]), torch.tensor([5, 6, 9])))]
        torch.save(contents, tmp_path / name / "predictions.pt")
        folders.append(str(tmp_path / name))
    return folders


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ensemble_classifier.py", *words])
    runpy.run_path(str(ROOT / "tasks/ensemble_classifier.py"), run_name="__main__")


def test_accuracy_and_tables(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--paths", *models, "--prediction-name", "predictions.pt"]
    run(monkeypatch, *common, "--eval")
    assert " >> overall: correct / total = 2 / 3 = 66.6667 %" in capsys.readouterr().out
    run(monkeypatch, *common, "--outdir", f"{tmp_path}/out", "--labels", "no", "yes")
    assert (tmp_path / "out/dev.tsv").read_text() == "5\tno\n6\tyes\n9\tno\n"


def test_bad_input(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--paths", *models, "--prediction-name", "predictions.pt"]
    with pytest.raises(SystemExit, match="--labels gives 3 names, dev has 2 classes"):
        run(monkeypatch, *common, "--outdir", f"{tmp_path}/out", "--labels", "a", "b", "c")
    with pytest.raises(SystemExit, match="no predictions in .*test_predictions.pt"):
        run(monkeypatch, "--paths", *models, "--eval")
    torch.save([("test", (ONE, torch.zeros(3), torch.arange(3)))], f"{models[1]}/predictions.pt")
    with pytest.raises(SystemExit, match="different questions"):
        run(monkeypatch, *common, "--eval")
    Path(models[0], "predictions.pt").write_text("text")
    with pytest.raises(SystemExit, match="does not hold predictions"):
        run(monkeypatch, *common, "--eval")
