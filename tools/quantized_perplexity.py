"""What quantized weights cost a trained GPT: its perplexity on held-out text with each kind, and the bytes of weights.

    python tools/quantized_perplexity.py --load quickstart/checkpoints --use-checkpoint-args \
        --tokenizer-type GPT2BPETokenizer --vocab-file quickstart/vocab/vocab.json \
        --merge-file quickstart/vocab/merges.txt --texts quickstart/corpus.jsonl --last-share 0.1

Documents are cut in windows of the model's context; each token but a window's first is predicted from those before it
in the window. Under torchrun the model is spread by its parallel flags.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the program beside this folder

from megatron.core.inference.quantization import KINDS_OF_WEIGHTS, quantize_weights
from megatron.inference.scoring import ScoredText, score
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.load import load_run
from megatron.training.errors import exit_at_once_on_error
from pretrain_gpt import model_provider


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("perplexity of quantized weights")
    group.add_argument("--texts", type=Path, required=True, help='JSON lines with a "text" each')
    group.add_argument("--last-share", type=float, default=1.0, help="only the last documents, this share of them")
    group.add_argument("--kinds", nargs="+", choices=KINDS_OF_WEIGHTS, default=list(KINDS_OF_WEIGHTS))
    group.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.set_defaults(exit_on_missing_checkpoint=True, no_load_optim=True, no_load_rng=True, micro_batch_size=16)
    return parser


def windows(path: Path, last_share: float, tokenizer: Any, length: int) -> list[ScoredText]:
    """What is predicted.

    Raises:
        ValueError: there is no text.
    """
    with open(path, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts = texts[len(texts) - math.ceil(len(texts) * last_share) :]
    rows = [list(tokenizer.tokenize(text)) for text in texts]
    cut = [row[start : start + length] for row in rows for start in range(0, len(row), length)]
    found = [ScoredText(row, 1) for row in cut if len(row) > 1]
    if not found:
        raise ValueError(f"--texts {path}: no document has two tokens")
    return found


def perplexity(model: list[torch.nn.Module], texts: list[ScoredText], batch_size: int) -> float:
    tokens = sum(len(text.tokens) - 1 for text in texts)
    return math.exp(-sum(found.log_likelihood for found in score(model, texts, batch_size=batch_size)) / tokens)


def report() -> None:
    initialize_megatron(add_arguments)
    args = get_args()
    texts = windows(args.texts, args.last_share, get_tokenizer(), args.seq_length)
    rows: dict[str, dict[str, float]] = {}
    for kind in (None, *args.kinds):
        model = get_model(model_provider, wrap_with_ddp=False)
        load_run(args, model, None, None)
        quantized = quantize_weights(model, kind) if kind else None
        row = {"perplexity": perplexity(model, texts, args.micro_batch_size)}
        if quantized is not None:
            row["bytes_of_linear_layers_on_rank_0"] = quantized.bytes_after
            row["of_the_bytes_before"] = quantized.bytes_after / quantized.bytes_before
            row["perplexity_difference"] = row["perplexity"] - rows["as trained"]["perplexity"]
        rows[kind or "as trained"] = row
        print_rank_0(f"{kind or 'as trained'}: {json.dumps(row)}")
    if args.output and torch.distributed.get_rank() == 0:
        tokens = sum(len(text.tokens) - 1 for text in texts)
        args.output.write_text(json.dumps({"tokens": tokens, "windows": len(texts), "results": rows}, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_at_once_on_error():
        report()
