"""Join all data sets of a folder into one, in the order of their names.

    python tools/merge_datasets.py --input parts --output-prefix data/all

Memory does not grow with their size. A pair of files that is named like the output is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.datasets.other_writers import datasets_in, merge_datasets


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder with .bin and .idx files")
    parser.add_argument("--output-prefix", required=True, help="path of the joined files without their suffix")
    parser.add_argument("--multimodal", action="store_true", help="the data sets have a mode for each sequence")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    output = os.path.realpath(args.output_prefix)
    prefixes = [prefix for prefix in datasets_in(args.input) if os.path.realpath(prefix) != output]
    merge_datasets(prefixes, args.output_prefix, args.multimodal)
    print(f"joined {len(prefixes)} data sets: {', '.join(prefixes)}", file=sys.stderr)


def main() -> None:
    try:
        run(parse_args())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no output was written")


if __name__ == "__main__":
    main()
