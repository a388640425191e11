"""Build every index that a training run reads, before it is launched: on one machine, without accelerators.

    python tools/build_dataset_cache.py [--ranks N] [PROGRAM.py] FLAGS

FLAGS are those of the run, PROGRAM.py is pretrain_gpt.py unless given. The sizes of the indices depend on the global
batch; where --global-batch-size is not among the flags, --ranks says on how many ranks the run will be started.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a clone that is not installed, too

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.training.datasets.run_data import RunData, load_run_data
from megatron.training.datasets.tables import format_table

NOT_KEPT = """
Without --data-cache-path the indices lie beside the data, and that of the blend is not kept: each rank computes it."""


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """(program, flags) of the words after this tool's own flags."""
    if words and words[0].endswith(".py"):
        return words[0], words[1:]
    return str(ROOT / "pretrain_gpt.py"), words


def indices_of(data: RunData) -> list[dict]:
    """A row for each index: split, dataset, samples, and whether it was built just now."""
    rows = []
    for split, top in data.datasets.items():
        if top is None:
            continue
        members = [*top.datasets, top] if isinstance(top, BlendedDataset) else [top]
        for dataset in members:
            path = "(their blend)" if dataset is top and len(members) > 1 else dataset.dataset_path
            state = "built" if dataset.built_anew_on_cache_miss else "was there"
            rows.append({"split": split, "dataset": path, "samples": len(dataset), "index": state})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, help="number of ranks of the run (default: the fewest it can have)")
    own, words = parser.parse_known_args()
    program, flags = split_command(words)
    start = time.monotonic()
    try:
        data = load_run_data(program, flags, own.ranks)
    except (OSError, ValueError, IndexError) as error:
        raise SystemExit(f"build_dataset_cache.py: {error}") from None
    rows = indices_of(data)
    print(format_table(rows))
    num_built = sum(row["index"] == "built" for row in rows)
    print(f"{num_built} of {len(rows)} indices built in {time.monotonic() - start:.1f} s")
    if data.args.data_cache_path is None and any(row["dataset"] == "(their blend)" for row in rows):
        print(NOT_KEPT.strip())


if __name__ == "__main__":
    main()
