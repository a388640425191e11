"""The context of a server's engine, as the flags want it."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from megatron.core import parallel_state
from megatron.core.inference.contexts import DynamicInferenceContext, cache_sizes_of
from megatron.training.settings import was_given

_DYNAMIC = "inference_dynamic_batching_"


def context_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the context: a flag `--inference-...` that was given goes before the server's own (`--cache-gb`,
    `--cache-chunk-size`, `--max-running`), whose defaults fit a small machine.

    Raises:
        ValueError: texts were to be longer than the model's positions.
    """

    def chosen(own: Any, *names: str) -> Any:
        return next((getattr(args, name) for name in names if was_given(args, name)), own)

    length = chosen(args.max_position_embeddings, "inference_max_seq_length")
    if length > args.max_position_embeddings:
        raise ValueError(
            f"--inference-max-seq-length ({length}) is above --max-position-embeddings ({args.max_position_embeddings})"
        )
    requests = chosen(args.max_running, f"{_DYNAMIC}max_requests_override", "inference_max_batch_size")
    return {
        "max_sequence_length": length,
        "buffer_size_gb": chosen(args.cache_gb, f"{_DYNAMIC}buffer_size_gb"),
        "buffer_guaranteed_fraction": chosen(0.1, f"{_DYNAMIC}buffer_guaranteed_fraction"),
        "buffer_overflow_factor": chosen(None, f"{_DYNAMIC}buffer_overflow_factor"),
        "chunk_size_tokens": chosen(args.cache_chunk_size, f"{_DYNAMIC}chunk_size"),
        "max_requests_override": requests,
        "max_tokens_override": chosen(max(requests, 2048), f"{_DYNAMIC}max_tokens_override"),
    }


def build_context(args: argparse.Namespace, model: list[nn.Module]) -> DynamicInferenceContext:
    """For the model of this rank. Communicates: see `cache_sizes_of`."""
    return DynamicInferenceContext(
        params_dtype=args.params_dtype,
        num_layers=args.num_layers,
        kv_channels=args.kv_channels,
        num_attention_heads=args.num_attention_heads,
        token_multiple=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        cache_sizes=cache_sizes_of(model, args.params_dtype, parallel_state.get_pipeline_model_parallel_group()),
        **context_settings(args),
    )
