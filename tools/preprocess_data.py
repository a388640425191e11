r"""Turn JSON lines into the token files that training reads.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --append-eod --workers 4 \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

writes data/corpus_text_document.bin and .idx; training reads them with `--data-path
data/corpus_text_document`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields

from megatron.training.config.data import TokenizerConfig
from megatron.training.config.flags import flag_of
from megatron.training.datasets.json_lines import InputFiles
from megatron.training.datasets.partitions import partition_paths, write_partitions
from megatron.training.datasets.preprocessing import DocumentEncoder, merge, preprocess
from megatron.training.tokenizer import build_tokenizer


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as possible without touching a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input data")
    group.add_argument("--input", required=True, help="JSON lines, plain or .gz; a pattern such as 'a/*.jsonl'")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose values are tokenized")
    group.add_argument("--split-sentences", action="store_true", help="make each sentence a sequence")
    group.add_argument("--keep-newlines", action="store_true", help="keep newlines when splitting sentences")
    group.add_argument("--lang", default="english", help="language for splitting sentences")
    group = parser.add_argument_group("tokenization")
    group.add_argument("--append-eod", action="store_true", help="end each document with the eod token")
    for field in fields(TokenizerConfig):
        flag = flag_of("tokenizer", TokenizerConfig, field.name)
        choices = {"choices": flag.choices} if flag.choices else {}
        group.add_argument(
            *flag.names,
            dest=flag.dest,
            type=flag.type,
            nargs=flag.nargs,
            default=flag.default,
            help=flag.help,
            **choices,
        )
    group = parser.add_argument_group("output and work")
    group.add_argument("--output-prefix", required=True, help="start of the output's names")
    group.add_argument("--workers", type=int, required=True, help="processes that tokenize")
    group.add_argument("--partitions", type=int, default=1, help="files that the input is cut into first")
    group.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    group.add_argument("--keep-sequential-samples", action="store_true", help="partitions are runs of lines")
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
    if args.workers % args.partitions:
        return f"--workers ({args.workers}) must be a multiple of --partitions ({args.partitions})"
    if len(set(args.json_keys)) < len(args.json_keys):
        return f"--json-keys names a key twice: {' '.join(args.json_keys)}"
    if args.split_sentences:
        return "--split-sentences is not built yet: without it each document is one sequence"
    if args.keep_newlines:
        return "--keep-newlines has no effect without --split-sentences"
    if args.tokenizer_type is None:
        return "--tokenizer-type must be given"
    return None


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    # each worker is one process on one core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    files = InputFiles(args.input)
    encoder = DocumentEncoder(build_tokenizer(args), args.json_keys, args.append_eod)
    if args.partitions == 1:
        preprocess(files, args.output_prefix, encoder, args.workers, args.log_interval)
        return
    paths = partition_paths(args.input, args.partitions)
    if not write_partitions(files, paths, args.keep_sequential_samples):
        print(f"using the partitions {paths[0]} to {paths[-1]} as they are", file=sys.stderr)
    prefixes = [f"{args.output_prefix}_{i}" for i in range(args.partitions)]
    for path, prefix in zip(paths, prefixes):
        preprocess(InputFiles(str(path)), prefix, encoder, args.workers, args.log_interval)
    merge(prefixes, args.output_prefix, encoder)


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
