"""A vector for each text from a trained BERT (`--load`, `hf:DIR` too), as a NumPy file [texts, hidden].

    python tools/embed_texts.py --load hf:DIR --tokenizer-type BertWordPieceLowerCase --vocab-file DIR/vocab.txt \
        --texts texts.jsonl --output vectors.npy

It is the mean over the text's tokens; longer texts count with their first --seq-length tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the program beside this folder

from megatron.inference.embedding import embed
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.load import load_run
from megatron.training.errors import exit_at_once_on_error
from pretrain_bert import model_provider


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("vectors of texts")
    group.add_argument("--texts", type=Path, required=True, help='JSON lines with a "text" each')
    group.add_argument("--output", type=Path, required=True, help="where the vectors go, a .npy file")
    parser.set_defaults(embeds_texts=True, output_bert_embeddings=True, micro_batch_size=32)
    parser.set_defaults(exit_on_missing_checkpoint=True, no_load_optim=True, no_load_rng=True)
    return parser


def write_vectors() -> None:
    initialize_megatron(add_arguments, args_defaults={"model_family": "bert"})
    args, tokenizer = get_args(), get_tokenizer()
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    with open(args.texts, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    rows = [[tokenizer.cls, *tokenizer.tokenize(text)[: args.seq_length - 2], tokenizer.sep] for text in texts]
    vectors = embed(model, rows, batch_size=args.micro_batch_size)
    if torch.distributed.get_rank() == 0:
        numpy.save(args.output, vectors.cpu().numpy())
    print_rank_0(f"{len(vectors)} vectors of {vectors.size(1)} numbers are in {args.output}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_at_once_on_error():
        write_vectors()
