"""Put the answers of several finetuned models together: the mean of their probabilities decides.

    python tasks/ensemble_classifier.py --paths runs/a/best runs/b/best --prediction-name predictions.pt --eval

`tasks/main.py --epochs 0` writes the predictions. With --outdir a table of ids and answers is written for each set. The
answer is the likeliest class; with thresholds it is every class that is likely enough.
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


# --- answers of several classes, or of none -------------------------------------------------------


def best_thresholds(predictions: Predictions, *, same_for_all: bool) -> list[float]:
    """For each class the probability above which saying it has the highest F1 on all sets with labels together.

    A probability that some question got is tried, and 0. With `same_for_all` one number has the highest mean F1.

    Raises:
        ValueError: no set has labels.
    """
    labelled = [parts for parts in predictions.values() if (parts[1] >= 0).all()]
    if not labelled:
        raise ValueError("--calc-threshold needs a set with labels")
    probabilities = torch.cat([parts[0] for parts in labelled])
    is_right = torch.nn.functional.one_hot(torch.cat([parts[1] for parts in labelled]), probabilities.size(1)) > 0
    if same_for_all:
        tried = torch.cat([torch.zeros(1), probabilities.flatten().unique()])
        scores = torch.stack([f1_of(probabilities > threshold, is_right).mean() for threshold in tried])
        return [float(tried[scores.argmax()])] * probabilities.size(1)
    found = []
    for column, right in zip(probabilities.T, is_right.T):
        tried = torch.cat([torch.zeros(1), column.unique()])
        said = column[None] > tried[:, None]  # [thresholds, questions]
        found.append(float(tried[f1_of(said.T, right[:, None].expand_as(said.T)).argmax()]))
    return found


def f1_of(said: Tensor, right: Tensor) -> Tensor:
    """[classes] of [questions, classes]: 2 true positives / (said + right); 0 where neither is."""
    both = (said & right).sum(0).double()
    return 2 * both / (said.sum(0) + right.sum(0)).clamp(min=1)


def f1_lines(predictions: Predictions, thresholds: Tensor, names: list[str]) -> list[str]:
    """F1 of each class, of each set with labels."""
    lines = []
    for name, (probabilities, labels, _) in predictions.items():
        if (labels >= 0).all():
            right = torch.nn.functional.one_hot(labels, probabilities.size(1)) > 0
            scores = f1_of(probabilities > thresholds, right).tolist()
            shown = ", ".join(f"{each} {score:.4f}" for each, score in zip(names, scores))
            lines.append(f" > F1 on {name}: {shown}, mean {sum(scores) / len(scores):.4f}")
    return lines or ["no set has labels"]


def thresholds_of(words: list[float], num_classes: int) -> Tensor:
    """A threshold for each class.

    Raises:
        ValueError: neither one nor one for each is given.
    """
    if len(words) not in (1, num_classes):
        raise ValueError(f"--threshold gives {len(words)} numbers for {num_classes} classes: give one, or one for each")
    return torch.tensor(words, dtype=torch.float64).expand(num_classes)


def write_answers(predictions: Predictions, folder: Path, thresholds: Tensor, names: list[str]) -> list[Path]:
    """A file for each set: a line of names, and for each question its id and a 1 for each class that it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (probabilities, _, uids) in predictions.items():
        rows = ["\t".join(["id", *names])]
        said = (probabilities > thresholds).long().tolist()
        rows += ["\t".join(map(str, [uid, *answer])) for uid, answer in zip(uids.tolist(), said)]
        written.append(folder / f"{name}.tsv")
        written[-1].write_text("\n".join(rows) + "\n")
    return written


# --- one answer -----------------------------------------------------------------------------------


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
    parser.add_argument(
        "--threshold", type=float, nargs="+", metavar="P", help="give a question every class above this probability"
    )
    parser.add_argument("--calc-threshold", action="store_true", help="find the thresholds with the highest F1")
    parser.add_argument("--one-threshold", action="store_true", help="with --calc-threshold: the same for all classes")
    args = parser.parse_args()
    if not args.eval and args.outdir is None and not args.calc_threshold:
        parser.error("give --eval, --calc-threshold, or --outdir for the tables")
    if args.one_threshold and not args.calc_threshold:
        parser.error("--one-threshold says which thresholds --calc-threshold finds")
    if args.threshold and args.calc_threshold:
        parser.error("--threshold and --calc-threshold exclude each other")
    try:
        predictions = mean_of([read_predictions(Path(path) / args.prediction_name) for path in args.paths])
        print("\n".join(said_of(predictions, args)))
    except ValueError as error:
        sys.exit(f"{parser.prog}: error: {error}")


def said_of(predictions: Predictions, args: argparse.Namespace) -> list[str]:
    """Do what the flags ask for; what there is to say."""
    outdir = None if args.outdir is None else Path(args.outdir)
    if not (args.threshold or args.calc_threshold):
        if args.eval:
            return accuracy_lines(predictions)
        assert outdir is not None
        return [f"answers are in {path}" for path in write_tables(predictions, outdir, args.labels)]
    num_classes = next(iter(predictions.values()))[0].size(1)
    names = args.labels or [str(number) for number in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"--labels gives {len(names)} names for {num_classes} classes")
    words = args.threshold or best_thresholds(predictions, same_for_all=args.one_threshold)
    thresholds, lines = thresholds_of(words, num_classes), []
    if args.calc_threshold:
        lines.append(f"--threshold {' '.join(str(word) for word in words)}")
    if args.eval:
        lines += f1_lines(predictions, thresholds, names)
    if outdir is not None:
        written = write_answers(predictions, outdir, thresholds, names)
        lines += [f"answers are in {path}" for path in written]
    return lines


if __name__ == "__main__":
    main()
