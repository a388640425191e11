"""Memory that a layout needs, from the formulas of Korthikanti et al. (arXiv:2205.05198, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class TheoreticalMemory:
    """Bytes on the most loaded rank."""

    weights_and_optimizer: float
    activations: float | None
    """None where the formula does not apply: it assumes sequence parallelism and selective recomputation."""

    def __str__(self) -> str:
        weights = self.weights_and_optimizer / _MEGABYTE
        if self.activations is None:
            return f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB"
        activations = self.activations / _MEGABYTE
        return (
            f"Theoretical memory footprints: weight and optimizer={weights:.2f} MB, activation={activations:.2f} MB, "
            f"total={weights + activations:.2f} MB"
        )


def theoretical_memory(args: Any, num_microbatches: int | None = None) -> TheoreticalMemory:
    """What the most loaded rank (the first stage) holds."""
    applies = args.sequence_parallel and args.recompute_granularity == "selective"
    return TheoreticalMemory(_weights_and_optimizer(args), _activations(args, num_microbatches) if applies else None)


def report_theoretical_memory(args: Any, num_microbatches: int | None = None, verbose: bool = False) -> str:
    """The line that the first log of a run shows."""
    return f"{theoretical_memory(args, num_microbatches)}\n"


def _weights_and_optimizer(args: Any) -> float:
    h, a = args.hidden_size, args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else a
    gated = 1.5 if args.swiglu else 1.0
    attention = 2 * h * h * (1 + groups / a) * (args.kv_channels * a / h)
    layer = 2 * h * (args.ffn_hidden_size * gated + 2) + attention
    block = args.num_layers * layer + 2 * h
    embedding = h * args.padded_vocab_size
    untied, pp = args.untie_embeddings_and_output_weights, args.pipeline_model_parallel_size
    tp = args.tensor_model_parallel_size
    parameters = (block / pp + embedding) / tp + (embedding / tp if untied and pp == 1 else 0)
    bytes_each = 6 + 12 / args.data_parallel_size if args.use_distributed_optimizer else 18
    return parameters * bytes_each


def _activations(args: Any, num_microbatches: int | None) -> float:
    s, b, h = args.seq_length, args.micro_batch_size, args.hidden_size
    pp, vpp = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    total = s * b * h * (18 + 4 * args.ffn_hidden_size / h) * args.num_layers
    total += 8 * s * b * pp + s * b * h * pp  # ids and embedding dropout of the microbatches in flight
    if vpp is not None:
        total *= 1 + (pp - 1) / (pp * vpp)
    elif pp > 1:
        total *= 1 if num_microbatches is None else min(1, num_microbatches / pp)
    else:
        total += 4 * s * b * h * (1 + args.padded_vocab_size / h)
    return total / args.tensor_model_parallel_size
