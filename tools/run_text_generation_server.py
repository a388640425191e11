"""Serve a trained GPT over HTTP, from a checkpoint of any layout or a Hugging Face directory (`--load hf:DIR`).

    python tools/run_text_generation_server.py --load checkpoints --use-checkpoint-args \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --port 5000

    curl localhost:5000/api -X PUT -H "Content-Type: application/json" \
        -d '{"prompts": ["Call me"], "tokens_to_generate": 20}'

Under torchrun the model is spread by --tensor-model-parallel-size and --pipeline-model-parallel-size; more ranks hold
further copies of it, over which requests are spread. See docs/inference.md for the routes.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the program beside this folder

import pretrain_gpt
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.quantization import KINDS_OF_WEIGHTS, quantize_weights
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.weight_order import order_weights
from megatron.inference.context_of_flags import build_context
from megatron.inference.serving import http
from megatron.inference.text_generation_server import MegatronServer, defaults_of_calls
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron
from megatron.training.checkpoint.load import load_run
from megatron.training.errors import exit_at_once_on_error
from megatron.training.failure.start import start_failure_watch, stop_failure_watch

STRICT = ("assume_ok_unexpected", "raise_unexpected", "raise_all")
"""Ways to load a checkpoint that mind what it lacks."""


def add_server_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("text generation server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them")
    group.add_argument("--port", type=int, default=5000, help="port to listen on")
    group.add_argument("--model-name", help="name that clients call the model by; default: the checkpoint's folder")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that clients must send")
    group.add_argument("--cache-gb", type=float, default=1.0, help="GiB for keys and values on each rank")
    group.add_argument("--cache-chunk-size", type=int, default=64, help="tokens of a chunk of the cache")
    group.add_argument(
        "--max-running",
        "--max-batch-size",
        type=int,
        default=64,
        help="requests that run at once",
    )
    group.add_argument("--max-waiting", type=int, default=256, help="requests that wait; more are answered with 503")
    group.add_argument("--max-tokens", type=int, help="new tokens a client may ask for; default: what fits")
    group.add_argument("--max-body-mb", type=float, default=4.0, help="MiB of a request's body")
    group.add_argument("--quantize", choices=KINDS_OF_WEIGHTS, help="store the weights of linear layers in few bits")
    add_drawing_arguments(parser, "calls of PUT /api that do not say")
    parser.set_defaults(
        serves_texts=True, exit_on_missing_checkpoint=True, no_load_optim=True, no_load_rng=True, micro_batch_size=1
    )
    return parser


def add_drawing_arguments(parser: argparse.ArgumentParser, whose: str) -> None:
    """How tokens are drawn; None is what the library does."""
    group = parser.add_argument_group(f"how tokens are drawn: for {whose}")
    group.add_argument("--num-tokens-to-generate", type=int, help="new tokens, at most")
    group.add_argument("--temperature", type=float, help="divides the logits")
    group.add_argument("--top_k", type=int, help="draw among the k best; 1 is greedy, 0 no limit")
    group.add_argument("--top_p", type=float, help="draw within this mass; 0 is no limit")
    group.add_argument("--return-log-probs", action="store_true", default=None, help="log-probabilities too")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError: the layout or a limit cannot be served; the same on all ranks."""
    for name, least in (("cache_chunk_size", 1), ("max_running", 1), ("max_waiting", 0), ("max_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")
    for name in ("cache_gb", "max_body_mb"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be above 0")
    if args.virtual_pipeline_model_parallel_size:
        raise ValueError("a server runs no interleaved pipeline: leave --num-layers-per-virtual-pipeline-stage out")
    if args.context_parallel_size > 1:
        raise ValueError("--context-parallel-size above 1 is not served; a checkpoint loads into any other layout")
    check_replicas(args)
    if not (args.load or args.pretrained_checkpoint):
        raise ValueError("there is nothing to serve: give --load DIR or --load hf:DIR")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port ({args.port}) must be from 0, which is any free one, to 65535")
    if args.dist_ckpt_strictness not in STRICT:
        raise ValueError(
            f"--dist-ckpt-strictness {args.dist_ckpt_strictness} leaves parameters that are not in the checkpoint as "
            "they are: a server does not answer from random numbers"
        )
    if args.api_key_env and not os.environ.get(args.api_key_env):
        raise ValueError(f"--api-key-env {args.api_key_env}: there is no such environment variable, or it is empty")


def check_replicas(args: argparse.Namespace) -> None:
    """Raises ValueError: copies of the model would have to run in step."""
    tensor, experts = args.tensor_model_parallel_size, args.expert_model_parallel_size
    ranks_of_experts = experts * (args.expert_tensor_parallel_size or tensor)
    if args.data_parallel_size > 1 and experts > 1 and tensor % ranks_of_experts:
        raise ValueError(
            f"{args.world_size} ranks hold {args.data_parallel_size} copies of the model, which share experts: give as "
            "many ranks as --tensor-model-parallel-size x --pipeline-model-parallel-size, or let "
            f"--expert-model-parallel-size x --expert-tensor-parallel-size ({ranks_of_experts}) divide "
            f"--tensor-model-parallel-size ({tensor})"
        )


def build_engine(args: argparse.Namespace, model: list[torch.nn.Module], tokenizer: Any) -> DynamicInferenceEngine:
    """An engine over the model of this rank."""
    context = build_context(args, model)
    config = InferenceWrapperConfig(args.hidden_size, args.params_dtype, -1, args.padded_vocab_size)
    wrapper = GPTInferenceWrapper(model, config, context)
    return DynamicInferenceEngine(
        TextGenerationController(wrapper, tokenizer), context, int(tokenizer.eod), random_seed=args.seed
    )


def serve(
    model_provider: Callable[..., Any] = pretrain_gpt.model_provider,
    family: str | None = None,
    engine_provider: Callable[[argparse.Namespace, list[torch.nn.Module], Any], DynamicInferenceEngine] = build_engine,
) -> None:
    """Load and serve until a signal comes.

    Args:
        model_provider: of the program that trained the model.
        family: of its flags; None is a GPT.
        engine_provider: (flags, model of this rank, tokenizer) -> an engine over the model.
    """
    initialize_megatron(add_server_arguments, args_defaults={"model_family": family} if family else {})
    args, tokenizer = get_args(), get_tokenizer()
    check(args)
    defaults_of_calls(args)
    start_failure_watch(60.0 * args.distributed_timeout_minutes, heeds_sigterm=False)
    is_first = torch.distributed.get_rank() == 0
    listener = http.bind(args.host, args.port) if is_first else None  # before the model, which may take minutes
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)
    if args.quantize:
        quantize_weights(model, args.quantize)
    order_weights(model)
    MegatronServer(engine_provider(args, model, tokenizer), args, listener=listener).run(args.host, args.port)
    stop_failure_watch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_at_once_on_error():
        serve()
