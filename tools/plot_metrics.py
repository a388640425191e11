"""Draw the loss curve of a run from its metrics file, and print where it ended.

    python tools/plot_metrics.py --metrics checkpoints/metrics.jsonl --output loss.png \
        --reference 6.6 --reference-name "unigram entropy"

A run that was resumed from an older checkpoint did some iterations twice; the last one counts.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

Curve = dict[int, float]  # value by iteration


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; the last may be cut off by a kill, any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise SystemExit(f"{path}, line {number}: not valid JSON ({error})") from None
    return rows


def curve(rows: list[dict[str, Any]], name: str) -> Curve:
    """What `name` was at each iteration that has it, in order of iterations."""
    return dict(sorted({row["iteration"]: row[name] for row in rows if name in row}.items()))


def smoothed(values: Curve, span: int) -> Curve:
    """Means over the last `span` entries."""
    steps = list(values)
    means = {}
    for position, step in enumerate(steps):
        window = [values[earlier] for earlier in steps[max(0, position + 1 - span) : position + 1]]
        means[step] = sum(window) / len(window)
    return means


def draw(training: Curve, validation: Curve, reference: tuple[str, float] | None, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    axes.plot(training.keys(), training.values(), color="tab:blue", alpha=0.3, linewidth=1, label="training")
    mean = smoothed(training, span=10)
    axes.plot(mean.keys(), mean.values(), color="tab:blue", linewidth=1.5, label="training, mean of 10 steps")
    axes.plot(validation.keys(), validation.values(), "o-", color="tab:orange", label="validation")
    if reference is not None:
        name, value = reference
        axes.axhline(value, color="gray", linestyle="--", linewidth=1, label=f"{name}, {value:.3f}")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    unfinished = output.with_name(output.name + ".unfinished")
    figure.savefig(unfinished, format=output.suffix.lstrip(".") or "png")
    os.replace(unfinished, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, e.g. loss.png")
    parser.add_argument("--loss", default="lm loss", help="which loss to draw")
    parser.add_argument("--reference", type=float, help="value of a horizontal line to compare with")
    parser.add_argument("--reference-name", default="reference", help="what that line is")
    args = parser.parse_args()
    if not args.metrics.is_file():
        parser.error(f"--metrics: no such file: {args.metrics}")
    rows = read_rows(args.metrics)
    training, validation = curve(rows, args.loss), curve(rows, f"{args.loss} validation")
    if not training:
        names = sorted({name for row in rows for name in row})
        raise SystemExit(f"{args.metrics}: no line has {args.loss!r}; it has {', '.join(names) or 'no line'}")
    reference = None if args.reference is None else (args.reference_name, args.reference)
    draw(training, validation, reference, args.output)
    print(f"loss curve: {args.output}")
    if validation:
        iteration, loss = list(validation.items())[-1]
        print(f"validation loss: {loss:.4f} nats per token at iteration {iteration}")
    if reference is not None:
        print(f"{reference[0]}: {reference[1]:.4f} nats per token")


if __name__ == "__main__":
    main()
