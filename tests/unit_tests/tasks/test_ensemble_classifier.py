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


def test_thresholds_have_the_highest_f1(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(40, 2, generator=generator).double()
    labels = (probabilities[:, 1] + 0.4 * torch.rand(40, generator=generator) > 0.8).long()
    for folder in models:
        torch.save([("dev", (probabilities, labels, torch.arange(40)))], f"{folder}/predictions.pt")
    common = ["--paths", *models, "--prediction-name", "predictions.pt"]

    def f1(threshold: float, column: int) -> float:
        said, right = probabilities[:, column] > threshold, labels == column
        return 2 * float((said & right).sum()) / max(1.0, float(said.sum() + right.sum()))

    run(monkeypatch, *common, "--calc-threshold")
    found = [float(word) for word in capsys.readouterr().out.split()[1:]]
    tried = [i / 1000 for i in range(1000)]
    for column in range(2):
        assert f1(found[column], column) == max(f1(found[column], column), *(f1(t, column) for t in tried))
    run(monkeypatch, *common, "--calc-threshold", "--one-threshold", "--eval")
    line, scores = capsys.readouterr().out.splitlines()
    one = [float(word) for word in line.split()[1:]]
    mean = (f1(one[0], 0) + f1(one[0], 1)) / 2
    assert one[0] == one[1] and mean == max(mean, *((f1(t, 0) + f1(t, 1)) / 2 for t in tried))
    assert scores == f" > F1 on dev: 0 {f1(one[0], 0):.4f}, 1 {f1(one[0], 1):.4f}, mean {mean:.4f}"


def test_every_class_above_its_threshold_is_an_answer(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--paths", *models, "--prediction-name", "predictions.pt", "--outdir", f"{tmp_path}/out"]
    run(monkeypatch, *common, "--threshold", "0.3", "0.5", "--labels", "no", "yes")
    assert (tmp_path / "out/dev.tsv").read_text() == "id\tno\tyes\n5\t1\t0\n6\t1\t1\n9\t1\t0\n"
    for words, message in (
        (["--threshold", "0.1", "0.2", "0.3"], "3 numbers for 2 classes"),
        (["--threshold", "0.1", "--labels", "a"], "1 names for 2 classes"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *common, *words)


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
