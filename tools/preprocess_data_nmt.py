"""Turn plain text into token files, a line a document: one side of a corpus for translation.

    python tools/preprocess_data_nmt.py --input corpus.en --output-prefix data/corpus_en --workers 4 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model en.model

writes data/corpus_en.bin and .idx. Line n of the text is document n and sequence n, also where it is empty.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.datasets.input_files import InputFiles
from megatron.training.datasets.other_writers import PlainOutput, TextLineEncoder
from megatron.training.datasets.preprocessing import preprocess
from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.flags import add_tokenizer_arguments

TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "SentencePieceTokenizer")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="text, plain or compressed")
    add_tokenizer_arguments(parser.add_argument_group("tokenizer"), TYPES)
    parser.add_argument("--output-prefix", required=True, help="path of the token files without their suffix")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--log-interval", type=int, default=100, help="documents between progress lines")
    args = parser.parse_args(arguments)
    if args.tokenizer_type is None:
        parser.error(f"--tokenizer-type must be given: one of {', '.join(TYPES)}")
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    output = PlainOutput(args.output_prefix, ("text",))
    encoder = TextLineEncoder(build_tokenizer(args), output.scratch)
    preprocess(InputFiles(args.input, scratch=output.scratch), output, encoder, args.workers, args.log_interval)


def main() -> None:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no output was written")


if __name__ == "__main__":
    main()
