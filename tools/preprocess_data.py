r"""Turn text into the token files that training reads.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 4 \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

writes data/corpus_text_document.bin and .idx; training reads them with `--data-path
data/corpus_text_document`.

The input is JSON lines, plain or compressed (.gz, .zst), or Parquet (.parquet). With --partitions, each partition is a
task of its own: --only runs one step on one machine, as in examples/data/preprocess_slurm.sh.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.datasets.input_files import STANDARD_INPUT
from megatron.training.datasets.preprocess_run import PreprocessRun
from megatron.training.tokenizer.flags import add_tokenizer_arguments


def build_parser() -> argparse.ArgumentParser:
    """All flags; an unambiguous beginning of one is enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="files, patterns such as 'a/*.jsonl' and folders, read in this order; - is standard input",
    )
    group.add_argument("--json-keys", nargs="+", default=["text"], help="keys or columns whose values are tokenized")
    group.add_argument("--skip-bad-lines", action="store_true", help="leave out and list lines that cannot be used")
    group.add_argument(
        "--split-sentences", action="store_true", help="make each sentence a sequence; <input>_ss keeps them as text"
    )
    group.add_argument("--keep-newlines", action="store_true", help="keep newlines when splitting sentences")
    group.add_argument("--lang", default="english", help="language for splitting sentences")
    group = parser.add_argument_group("tokenization")
    group.add_argument("--append-eod", action="store_true", help="end each document with the eod token")
    add_tokenizer_arguments(group)
    group = parser.add_argument_group("output and work")
    group.add_argument("--output-prefix", required=True, help="start of the output's names")
    group.add_argument("--workers", type=int, required=True, help="processes that tokenize")
    group.add_argument("--partitions", type=int, default=1, help="parts that are tokenized one by one, then merged")
    group.add_argument(
        "--partition-by",
        choices=["lines", "files"],
        default="lines",
        help="deal out lines, which are first written to a file for each partition, or whole input files as they are",
    )
    group.add_argument("--keep-sequential-samples", action="store_true", help="partitions are runs of lines or files")
    group.add_argument("--resume", action="store_true", help="keep what an earlier run with this command line finished")
    group.add_argument("--only", metavar="STEP", help="one step with --partitions: split, a partition's number, merge")
    group.add_argument("--ray-address", help="run the partitions as tasks of this Ray cluster ('auto': the local one)")
    group.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as possible without touching a file."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    problem = find_problem(args)
    if problem:
        parser.error(problem)
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the command line, None if nothing is."""
    for name in ("workers", "partitions", "log_interval"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    if len(set(args.json_keys)) < len(args.json_keys):
        return f"--json-keys names a key twice: {' '.join(args.json_keys)}"
    if args.keep_newlines and not args.split_sentences:
        return "--keep-newlines has no effect without --split-sentences"
    if args.tokenizer_type is None:
        return "--tokenizer-type must be given"
    return find_problem_with_partitions(args) or find_problem_with_standard_input(args)


def find_problem_with_partitions(args: argparse.Namespace) -> str | None:
    """What is wrong with the flags about partitions."""
    if args.only is None and args.workers % args.partitions:
        return f"--workers ({args.workers}) must be a multiple of --partitions ({args.partitions})"
    if args.partitions == 1:
        for name in ("only", "ray_address"):
            if getattr(args, name) is not None:
                return f"--{name.replace('_', '-')} has no effect without --partitions"
        if args.partition_by == "files":
            return "--partition-by files has no effect without --partitions"
    if args.only is not None and args.only not in ("split", "merge", *map(str, range(args.partitions))):
        return f"--only {args.only}: choose split, merge or a partition from 0 to {args.partitions - 1}"
    if args.only is not None and args.ray_address:
        return "--only and --ray-address are two ways to spread the partitions: choose one"
    return None


def find_problem_with_standard_input(args: argparse.Namespace) -> str | None:
    """What cannot be done with text that is there only once."""
    if STANDARD_INPUT not in args.input:
        return None
    if args.input.count(STANDARD_INPUT) > 1:
        return "--input names standard input (-) twice"
    if args.partitions > 1 and args.keep_sequential_samples:
        return "--keep-sequential-samples reads the input twice: write standard input (-) to a file first"
    if args.partitions > 1 and args.partition_by == "files":
        return "--partition-by files: standard input (-) is no file"
    if args.resume and args.partitions == 1:
        return "--resume: standard input (-) cannot be compared with what was read before"
    return None


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    # each worker is one process on one core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    PreprocessRun(args).run()


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no output was written")


if __name__ == "__main__":
    main()
