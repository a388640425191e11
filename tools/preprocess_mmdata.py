"""Turn texts and pictures into multimodal token files: each document is a text and a picture.

    python tools/preprocess_mmdata.py --input captions.jsonl --input-image pictures --pad-length 256 --append-eod \
        --output-prefix data/captions --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

writes data/captions_text.bin and .idx. Line n of the JSON lines belongs to the n-th file of the folder by name. A
picture is kept as the bytes of its file: int32 numbers, the first of which says how many zeros fill up the last.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.datasets.encoding import DocumentEncoder
from megatron.training.datasets.input_files import InputFiles
from megatron.training.datasets.other_writers import write_pictures_with_text
from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.flags import add_tokenizer_arguments

TYPES = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSON lines with a text each, under the key text")
    parser.add_argument("--input-image", required=True, help="folder with as many pictures")
    parser.add_argument("--pad-length", type=int, required=True, help="tokens of each text, with --append-eod")
    parser.add_argument("--append-eod", action="store_true", help="cut texts or fill them with eod to --pad-length")
    add_tokenizer_arguments(parser.add_argument_group("tokenizer"), TYPES)
    parser.add_argument("--output-prefix", required=True, help="start of the output's names")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--log-interval", type=int, default=100, help=argparse.SUPPRESS)
    parser.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep-newlines", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lang", default="english", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.tokenizer_type is None:
        parser.error(f"--tokenizer-type must be given: one of {', '.join(TYPES)}")
    if args.workers < 1 or args.pad_length < 1:
        parser.error("--workers and --pad-length must be at least 1")
    if args.split_sentences or args.keep_newlines:
        parser.error("--split-sentences: a document with a picture has one text, it is not split")
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.path.isdir(args.input_image):
        raise FileNotFoundError(f"no folder {args.input_image}")
    pictures = sorted(entry.path for entry in os.scandir(args.input_image) if entry.is_file())
    prefix = f"{args.output_prefix}_text"
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    encoder = DocumentEncoder(build_tokenizer(args), ["text"], append_eod=False)
    pad_length = args.pad_length if args.append_eod else None
    count = write_pictures_with_text(InputFiles(args.input), pictures, prefix, encoder, pad_length, args.workers)
    print(f"Processed {count} documents.", file=sys.stderr)


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
