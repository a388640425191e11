"""Say what a training run reads.

    python tools/data_explain.py [PROGRAM.py] FLAGS                 shares of each dataset: asked, achieved, epochs
    python tools/data_explain.py --step 1000 [PROGRAM.py] FLAGS     samples of a training step (the first is 1)
    python tools/data_explain.py --sample 7 [PROGRAM.py] FLAGS      one sample, with its text

FLAGS are those of the run, PROGRAM.py is pretrain_gpt.py unless given.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a clone that is not installed, too

from megatron.training.datasets.explain import consumed_before, explain_sample, samples_of_step, shares_of_run
from megatron.training.datasets.run_data import RunData, load_run_data
from megatron.training.datasets.tables import format_table

TEXT_IN_TABLE = 48


def parse() -> tuple[argparse.Namespace, str, list[str]]:
    """(own flags, program, the program's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, help="training step, from 1")
    what.add_argument("--sample", type=int, help="number of a sample, from 0, in the order of the data set")
    parser.add_argument("--of", default="train", help="data of --sample: train, valid (valid_0, ... of several), test")
    parser.add_argument("--json", action="store_true", help="print JSON, with whole texts")
    parser.add_argument("--ranks", type=int, help="number of ranks of the run (default: the fewest it can have)")
    own, words = parser.parse_known_args()
    if words and words[0].endswith(".py"):
        return own, words[0], words[1:]
    return own, str(ROOT / "pretrain_gpt.py"), words


def describe(own: argparse.Namespace, data: RunData) -> tuple[dict, str]:
    """The answer as values for JSON, and as text."""
    if own.sample is not None:
        found = {"split": own.of, "sample": own.sample} | explain_sample(data, own.of, own.sample)
        lines = [f"sample {own.sample} of {own.of}: sample {found['sample_of_dataset']} of {found['dataset']}"]
        table = format_table([part | {"unit": found["unit"]} for part in found["documents"]])
        return found, "\n".join([*lines, table, "", found["text"]])
    if own.step is not None:
        rows = [
            place | explain_sample(data, "train", place["sample"], None if own.json else TEXT_IN_TABLE)
            for place in samples_of_step(data, own.step)
        ]
        consumed, _ = consumed_before(data.args, own.step)
        title = f"step {own.step}: {len(rows)} samples after {consumed} consumed before"
        found = {"step": own.step, "consumed_samples": consumed, "samples": rows}
        return found, "\n".join([title, format_table([_short(row) for row in rows])])
    rows = list(shares_of_run(data))
    return {"datasets": rows}, format_table(rows)


def _short(row: dict) -> dict:
    """A sample in one line: documents as `number[begin:end]`, with the epoch after an @."""
    pieces = [
        f"{part['document']}[{part['begin']}:{part['end']}]" + ("" if part["epoch"] is None else f"@{part['epoch']}")
        for part in row["documents"]
    ]
    if len(pieces) > 4:
        pieces = [*pieces[:2], f"({len(pieces) - 3} more)", pieces[-1]]
    kept = {key: row[key] for key in ("microbatch", "rank", "sample", "dataset", "sample_of_dataset")}
    return kept | {f"documents ({row['unit']}, @epoch)": " ".join(pieces), "text": " ".join(row["text"].split())}


def main() -> None:
    own, program, flags = parse()
    try:
        found, text = describe(own, load_run_data(program, flags, own.ranks))
    except (OSError, ValueError, IndexError) as error:
        raise SystemExit(f"data_explain.py: {error}") from None
    print(json.dumps(found, indent=1, ensure_ascii=False) if own.json else text)


if __name__ == "__main__":
    main()
