"""Train a WordPiece vocabulary on JSON lines, in the file of `--tokenizer-type BertWordPieceLowerCase` or `...Case`.

    python tools/train_wordpiece.py --input corpus.jsonl --vocab-size 30522 --output bert-vocab.txt --lower-case

writes one piece a line (`--vocab-file`), the special tokens [PAD], [UNK], [CLS], [SEP], [MASK] first.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a clone that is not installed, too

from tools.train_bpe import read_texts, write_atomically

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALPHABET = 1000
"""Characters that get a piece of their own, the most frequent ones; words with others become [UNK]."""


def train(texts: Iterator[str], vocab_size: int, min_frequency: int, *, lower_case: bool) -> list[str]:
    """Pieces in the order of their ids."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=lower_case)
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        limit_alphabet=min(ALPHABET, vocab_size // 4),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda piece: ids[piece])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose text is learned from")
    parser.add_argument("--vocab-size", type=int, default=30522, help="number of pieces, special tokens included")
    parser.add_argument("--min-frequency", type=int, default=2, help="a pair seen less often is not merged")
    parser.add_argument("--lower-case", action="store_true", help="for BertWordPieceLowerCase; accents go, too")
    parser.add_argument("--output", type=Path, required=True, help="the vocabulary file")
    args = parser.parse_args()
    if args.vocab_size < 100:
        parser.error(f"--vocab-size ({args.vocab_size}) must be at least 100: letters alone need as many")
    missing = [str(path) for path in args.input if not path.is_file()]
    if missing:
        parser.error(f"--input: no such file: {', '.join(missing)}")
    return args


def main() -> None:
    args = parse_args()
    texts = read_texts(args.input, args.json_keys)
    pieces = train(texts, args.vocab_size, args.min_frequency, lower_case=args.lower_case)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, "".join(f"{piece}\n" for piece in pieces))
    print(f"{args.output}: {len(pieces)} pieces")
    if len(pieces) < args.vocab_size:
        print(f"{args.vocab_size} were asked for, but no further pair occurs {args.min_frequency} times.")


if __name__ == "__main__":
    main()
