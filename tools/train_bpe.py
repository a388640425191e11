"""Train a byte-level BPE vocabulary on JSON lines, in the files of `--tokenizer-type GPT2BPETokenizer`.

    python tools/train_bpe.py --input corpus.jsonl --vocab-size 8192 --output-dir vocab

writes `vocab/vocab.json` (`--vocab-file`) and `vocab/merges.txt` (`--merge-file`). Like GPT-2's own
vocabulary it splits text by GPT-2's pattern, starts from the 256 bytes, so that any text can be encoded, and
gives `<|endoftext|>` the last id.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256


def read_texts(paths: list[Path], keys: list[str]) -> Iterator[str]:
    """The strings under `keys` of each line; a bad line is named with its file and number."""
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                    yield from (document[key] for key in keys)
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{path}, line {number}: not valid JSON ({error})") from None
                except (KeyError, TypeError):
                    raise SystemExit(f"{path}, line {number}: no key {' or '.join(keys)} (see --json-keys)") from None


def train(texts: Iterator[str], vocab_size: int, min_frequency: int) -> tuple[dict[str, int], list[str]]:
    """Token ids and the merges in the order in which they were learned."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=min_frequency, show_progress=False)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return vocabulary, merges


def write_atomically(path: Path, content: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(content, encoding="utf-8")
    os.replace(unfinished, path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose text is learned from")
    parser.add_argument("--vocab-size", type=int, default=50257, help="number of tokens, <|endoftext|> included")
    parser.add_argument("--min-frequency", type=int, default=2, help="a pair seen less often is not merged")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for vocab.json and merges.txt")
    args = parser.parse_args()
    if args.vocab_size <= NUM_BYTES:
        parser.error(f"--vocab-size ({args.vocab_size}) must exceed {NUM_BYTES}: every byte is a token")
    missing = [str(path) for path in args.input if not path.is_file()]
    if missing:
        parser.error(f"--input: no such file: {', '.join(missing)}")
    return args


def main() -> None:
    args = parse_args()
    vocabulary, merges = train(read_texts(args.input, args.json_keys), args.vocab_size, args.min_frequency)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output_dir / "merges.txt", "#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    write_atomically(args.output_dir / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    print(f"{args.output_dir}: {len(vocabulary)} tokens, {len(merges)} merges")
    if len(vocabulary) < args.vocab_size:
        print(f"{args.vocab_size} were asked for, but no further pair occurs {args.min_frequency} times.")


if __name__ == "__main__":
    main()
