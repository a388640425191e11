"""Entropy of a dataset's tokens taken one by one: the loss of a model that knows their frequencies only.

    python tools/unigram_entropy.py --data-path corpus_text_document

prints the entropy in nats per token, the unit of the training loss. A model that has learned anything from
the context has a lower validation loss.
"""

import argparse
import sys
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a clone that is not installed, too

from megatron.core.datasets.indexed_dataset import IndexedDataset

SEQUENCES_AT_A_TIME = 4096


def count_tokens(dataset: IndexedDataset) -> numpy.ndarray:
    """[largest id + 1] int64: occurrences of each token."""
    counts = numpy.zeros(0, dtype=numpy.int64)
    for start in range(0, len(dataset), SEQUENCES_AT_A_TIME):
        sequences = dataset[start : start + SEQUENCES_AT_A_TIME]
        found = numpy.bincount(numpy.concatenate(sequences).astype(numpy.int64))
        if len(found) > len(counts):
            counts, found = found, counts
        counts[: len(found)] += found
    return counts


def entropy(counts: numpy.ndarray) -> float:
    """-sum p ln p over the tokens that occur, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * numpy.log(shares)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="dataset, without .bin or .idx")
    args = parser.parse_args()
    try:
        counts = count_tokens(IndexedDataset(args.data_path))
    except (OSError, ValueError) as error:
        raise SystemExit(f"unigram_entropy.py: {error}") from None
    if not counts.any():
        raise SystemExit(f"unigram_entropy.py: {args.data_path} has no tokens")
    print(f"{args.data_path}: {counts.sum():,} tokens, {(counts > 0).sum():,} different ones")
    print(f"unigram entropy: {entropy(counts):.4f} nats per token")


if __name__ == "__main__":
    main()
