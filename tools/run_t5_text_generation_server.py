"""Serve a trained T5 over HTTP: tools/run_text_generation_server.py for models of pretrain_t5.py.

    python tools/run_t5_text_generation_server.py --load hf:DIR --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model DIR --max-position-embeddings 512 --decoder-seq-length 256 --port 5000

A prompt is the encoder's, at most --max-position-embeddings tokens; the answer is what the decoder writes, at most
--decoder-seq-length with its start token.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the programs beside this folder

import pretrain_t5
from megatron.core import parallel_state
from megatron.core.inference.contexts import EncoderDecoderContext, cache_sizes_of
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.model_inference_wrappers.t5.t5_inference_wrapper import T5InferenceWrapper
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.inference.context_of_flags import context_settings
from megatron.training.checkpoint.find import hf_source
from megatron.training.errors import exit_at_once_on_error
from tools.run_text_generation_server import serve


def start_token(args: argparse.Namespace, tokenizer: Any) -> int:
    """The decoder's first token: what a directory of transformers says, else the tokenizer's begin of text."""
    directory = hf_source(args)
    if directory is None:
        return int(tokenizer.bos)
    config = json.loads((directory / "config.json").read_text())
    token = config.get("decoder_start_token_id")
    return int(config.get("pad_token_id") or 0) if token is None else int(token)


def build_engine(args: argparse.Namespace, model: list[torch.nn.Module], tokenizer: Any) -> DynamicInferenceEngine:
    """An engine over the T5 of this rank."""
    settings, group = context_settings(args), parallel_state.get_pipeline_model_parallel_group()
    context = EncoderDecoderContext(
        start_token(args, tokenizer),
        settings["max_sequence_length"],
        settings["max_requests_override"],
        max_decoded_length=args.decoder_seq_length,
        token_multiple=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        bytes_per_token=cache_sizes_of(model, args.params_dtype, group).per_encoded_token,
        buffer_size_gb=settings["buffer_size_gb"],
    )
    config = InferenceWrapperConfig(args.hidden_size, args.params_dtype, -1, args.padded_vocab_size)
    wrapper = T5InferenceWrapper(model, config, context)
    return DynamicInferenceEngine(
        TextGenerationController(wrapper, tokenizer), context, int(tokenizer.eos), random_seed=args.seed
    )


if __name__ == "__main__":
    with exit_at_once_on_error():
        serve(pretrain_t5.model_provider, "t5", build_engine)
