"""Put the answers of several finetuned models together: the mean of their probabilities decides.

    python tasks/ensemble_classifier.py --paths runs/a/best runs/b/best --prediction-name predictions.pt --eval

`tasks/main.py --epochs 0` writes the predictions. Without --eval a table of ids and answers is written for each set.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

Predictions = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Set -> probabilities [n, classes], labels [n], ids [n]."""


def read_predictions(path: Path) -> Predictions:
    """The predictions of one model.

    Raises:
        ValueError: the file is missing, or something else.
    """
    if not path.is_file():
        raise ValueError(f"there are no predictions in {path}; tasks/main.py --epochs 0 writes them")
    try:
        return {name: tuple(parts) for name, parts in torch.load(path, weights_only=True)}
    except Exception as error:
        raise ValueError(f"{path} does not hold predictions ({type(error).__name__})") from None


def mean_of(models: list[Predictions]) -> Predictions:
    """Each set with the mean of all models' probabilities.

    Raises:
        ValueError: the models have not answered the same questions.
    """
    first = models[0]
    for other in models[1:]:
        same = first.keys() == other.keys() and all(
            first[name][0].shape == other[name][0].shape and torch.equal(first[name][2], other[name][2])
            for name in first
        )
        if not same:
            raise ValueError(f"the models have answered different questions: {sorted(first)} and {sorted(other)}")
    return {name: (torch.stack([model[name][0] for model in models]).mean(0), *first[name][1:]) for name in first}


def accuracy_lines(predictions: Predictions) -> list[str]:
    """How often each set is right, and all together."""
    lines, correct, total = [], 0, 0
    for name, (probabilities, labels, _) in predictions.items():
        if (labels >= 0).all():
            right = int((probabilities.argmax(-1) == labels).sum())
            lines.append(f" > metrics for {name}: {_count(right, len(labels))}")
            correct, total = correct + right, total + len(labels)
    return [*lines, f" >> overall: {_count(correct, total)}"] if total else ["no set has labels"]


def _count(correct: int, total: int) -> str:
    return f"correct / total = {correct} / {total} = {100.0 * correct / total:.4f} %"


def write_tables(predictions: Predictions, folder: Path, names: list[str] | None) -> list[Path]:
    """A file with a line `id, tab, answer` for each question of each set; answers are class numbers without `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (probabilities, _, uids) in predictions.items():
        if names is not None and len(names) != probabilities.size(1):
            raise ValueError(f"--labels gives {len(names)} names, {name} has {probabilities.size(1)} classes")
        chosen = probabilities.argmax(-1).tolist()
        rows = [f"{uid}\t{names[answer] if names else answer}\n" for uid, answer in zip(uids.tolist(), chosen)]
        written.append(folder / f"{name}.tsv")
        written[-1].write_text("".join(rows))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--paths", nargs="+", required=True, metavar="DIR", help="one folder for each model")
    parser.add_argument("--prediction-name", default="test_predictions.pt", help="name of the file in them")
    parser.add_argument("--eval", action="store_true", help="print how often the ensemble is right")
    parser.add_argument("--outdir", metavar="DIR", help="where the tables go")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what the classes are called in the tables")
    args = parser.parse_args()
    if not args.eval and args.outdir is None:
        parser.error("give --eval, or --outdir for the tables")
    try:
        predictions = mean_of([read_predictions(Path(path) / args.prediction_name) for path in args.paths])
        if args.eval:
            print("\n".join(accuracy_lines(predictions)))
        else:
            for path in write_tables(predictions, Path(args.outdir), args.labels):
                print(f"answers are in {path}")
    except ValueError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
