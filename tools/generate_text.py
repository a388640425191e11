"""Continue prompts with a trained GPT, Mamba or hybrid model, from a checkpoint of any layout.

    python tools/generate_text.py --load checkpoints --use-checkpoint-args \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt \
        --prompts "Call me" "The whale" --num-tokens-to-generate 50 --temperature 0.8 --top_k 40

Under torchrun the model is spread by --tensor-model-parallel-size and --pipeline-model-parallel-size, which
need not be those it was trained with. A Mamba or hybrid model (--model-provider mamba, with its --spec) goes
on from its states, one token at a time. Decoding is greedy unless --top_k, --top_p and --temperature ask for
a draw.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the program beside this folder

import pretrain_gpt
import pretrain_mamba
from megatron.core.inference.quantization import KINDS_OF_WEIGHTS, quantize_weights
from megatron.core.inference.sampling_params import SamplingParams
from megatron.inference.continuation import text_behind
from megatron.inference.text_generation import generate
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.load import load_run
from megatron.training.errors import exit_at_once_on_error

PROVIDERS = {"gpt": (None, pretrain_gpt.model_provider), "mamba": ("mamba", pretrain_mamba.model_provider)}
"""Name -> family of the model, and what builds it."""


def chosen_provider() -> str:
    """What --model-provider says: which flags there are to check depends on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-provider", choices=list(PROVIDERS), default="gpt")
    chosen: str = parser.parse_known_args()[0].model_provider
    return chosen


def add_generation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("text generation")
    group.add_argument(
        "--model-provider", choices=list(PROVIDERS), default="gpt", help="program that trained the model"
    )
    group.add_argument("--prompts", nargs="+", metavar="TEXT", required=True, help="texts to continue")
    group.add_argument("--num-tokens-to-generate", type=int, default=30, help="new tokens a prompt, at most")
    group.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy")
    group.add_argument("--top_k", type=int, default=1, help="draw among the k best; 1 is greedy, 0 no limit")
    group.add_argument("--top_p", type=float, default=0.0, help="draw within this mass; 0 is no limit")
    group.add_argument("--quantize", choices=KINDS_OF_WEIGHTS, help="store the weights of linear layers in few bits")
    parser.set_defaults(exit_on_missing_checkpoint=True, no_load_optim=True, no_load_rng=True, micro_batch_size=1)
    return parser


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.num_tokens_to_generate,
        seed=args.seed,
    )


def write_texts() -> None:
    family, model_provider = PROVIDERS[chosen_provider()]
    initialize_megatron(add_generation_arguments, args_defaults={"model_family": family} if family else {})
    args, tokenizer = get_args(), get_tokenizer()
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    if args.quantize:
        quantize_weights(model, args.quantize)
    prompts = [tokenizer.tokenize(prompt) for prompt in args.prompts]
    continuations = generate(
        model,
        prompts,
        sampling_params(args),
        vocab_size=tokenizer.vocab_size,
        max_context=args.max_position_embeddings,
        end_of_document=tokenizer.eod,
    )
    for text, prompt, continuation in zip(args.prompts, prompts, continuations):
        print_rank_0(f"{text}{text_behind(tokenizer.detokenize, prompt)(continuation)}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_at_once_on_error():
        write_texts()
