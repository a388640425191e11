"""Memory that a layout needs, from the formulas of Korthikanti et al. (arXiv:2205.05198, section 4)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron.core.export.weights import is_gated
from megatron.training.flops import attention_parameters, feed_forward_width

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
    activations = _activations(args, num_microbatches) if _activation_formula_applies(args) else None
    return TheoreticalMemory(_weights_and_optimizer(args), activations)


def report_theoretical_memory(args: Any, num_microbatches: int | None = None, verbose: bool = False) -> str:
    """The line that the first log of a run shows; `verbose`, what it was computed from before it."""
    lines = _explanation(args, num_microbatches) if verbose else []
    return "\n".join([*lines, str(theoretical_memory(args, num_microbatches)), ""])


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model and of its shards."""

    block: float
    """Transformer layers and final norm, and the modules that predict further tokens."""
    embedding: float
    """Word embedding, twice when the output layer has its own."""
    most_loaded_shard: float
    """On a rank of the first stage."""
    other_shards: float | None
    """On a rank of a stage without embedding; None without pipeline."""


def count_parameters(args: Any) -> ParameterCounts:
    """From the sizes alone."""
    h, further = args.hidden_size, args.mtp_num_layers or 0
    block = _layers_and_norm(Namespace(**{**vars(args), "mtp_num_layers": None}))
    modules = _layers_and_norm(args) - block + further * (3 * h + 2 * h * h)
    table = h * args.padded_vocab_size
    untied, pp = args.untie_embeddings_and_output_weights, args.pipeline_model_parallel_size
    tp = args.tensor_model_parallel_size
    most_loaded = (block / pp + modules + table) / tp + (table / tp if untied and pp == 1 else 0)
    return ParameterCounts(
        block + modules, 2 * table if untied else table, most_loaded, block / (pp * tp) if pp > 1 else None
    )


def _layers_and_norm(args: Any) -> float:
    h, layers = args.hidden_size, args.num_layers + (args.mtp_num_layers or 0)
    width = feed_forward_width(args, args.num_experts or 0) * (1.5 if is_gated(vars(args)) else 1.0)
    return 2 * h * (width + 2 * layers) + layers * attention_parameters(args) + 2 * h


def _explanation(args: Any, num_microbatches: int | None) -> list[str]:
    billion, counts = 1e9, count_parameters(args)
    lines = [
        f"Number of parameters in transformer block in billions: {counts.block / billion:.2f}",
        f"Number of parameters in embedding layers in billions: {counts.embedding / billion:.2f}",
        f"Total number of parameters in billions: {(counts.block + counts.embedding) / billion:.2f}",
        f"Number of parameters in most loaded shard in billions: {counts.most_loaded_shard / billion:.4f}",
    ]
    if counts.other_shards is not None:
        lines.append(f"Number of parameters in other shards in billions: {counts.other_shards / billion:.4f}")
    if not _activation_formula_applies(args):
        return lines
    layer = _layer_activations(args) / _MEGABYTE / args.tensor_model_parallel_size
    lines.append(f"Activation memory footprint per transformer layer: {layer:.1f} MB")
    if args.virtual_pipeline_model_parallel_size is not None:
        lines.append(f"Memory penalty from interleaved schedule: {_interleaving_penalty(args):.2f}")
    pp = args.pipeline_model_parallel_size
    in_flight = pp if num_microbatches is None else min(num_microbatches, pp)
    lines.append(f"Number of in-flight microbatches: {in_flight}")
    return lines


def _weights_and_optimizer(args: Any) -> float:
    bytes_each = 6 + 12 / args.data_parallel_size if args.use_distributed_optimizer else 18
    if getattr(args, "use_precision_aware_optimizer", False) and args.bf16:
        main = 2  # the 16 bits that bf16 lacks, or fp16
        state = main + args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
        bytes_each = 2 + args.main_grads_dtype.itemsize + state / args.data_parallel_size
    counts = count_parameters(args)
    spared = _share_in_fp8(args) * counts.block / args.pipeline_model_parallel_size / args.tensor_model_parallel_size
    return counts.most_loaded_shard * bytes_each - spared


def _share_in_fp8(args: Any) -> float:
    """Of the layers' weights, how many are kept in a byte instead of two; biases and norms are too few to count."""
    if not getattr(args, "fp8_param_gather", False):
        return 0.0
    ends = args.num_layers_at_start_in_bf16 + args.num_layers_at_end_in_bf16 if args.first_last_layers_bf16 else 0
    return 1 - ends / args.num_layers


def _activation_formula_applies(args: Any) -> bool:
    return args.sequence_parallel and args.recompute_granularity == "selective"


def _layer_activations(args: Any) -> float:
    """Bytes that a layer keeps of one microbatch, on all tensor parallel ranks together."""
    h = args.hidden_size
    return args.seq_length * args.micro_batch_size * h * (18 + 4 * args.ffn_hidden_size / h)


def _interleaving_penalty(args: Any) -> float:
    """Activations in flight, relative to a schedule of one chunk a rank."""
    pp = args.pipeline_model_parallel_size
    return 1 + (pp - 1) / (pp * args.virtual_pipeline_model_parallel_size)


def _activations(args: Any, num_microbatches: int | None) -> float:
    s, b, h = args.seq_length, args.micro_batch_size, args.hidden_size
    pp = args.pipeline_model_parallel_size
    total = _layer_activations(args) * args.num_layers
    total += 8 * s * b * pp + s * b * h * pp  # ids and embedding dropout of the microbatches in flight
    if args.virtual_pipeline_model_parallel_size is not None:
        total *= _interleaving_penalty(args)
    elif pp > 1:
        total *= 1 if num_microbatches is None else min(1, num_microbatches / pp)
    else:
        total += 4 * s * b * h * (1 + args.padded_vocab_size / h)
    return total / args.tensor_model_parallel_size
