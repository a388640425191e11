"""The models that `gpu.py` trains: rows of flags, as a user would give them to a training program, and plain peers.

Each contender is alone in memory. Ours is the model of the flags with our schedule, gradient buffers and optimizer; the
peer is `plain_models.PlainModel` under `torch.compile` and autocast, with fp32 weights and torch's fused AdamW, and
beside mixtures of experts and hybrids the model of `transformers` in the same way.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_transformers import TransformersModel, transformers_model
from benchmarks.harness import Ceiling, take_turns
from benchmarks.plain_models import PlainModel
from benchmarks.training_steps import Step, prepare_one_process, scheduled_step, torch_step
from megatron.core import device as device_module
from megatron.core.fusions.compiled import why_not_compilable
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.tensor_parallel.initialization import deferred_initialization
from megatron.training.arguments import parse_args, validate_args
from megatron.training.flops import num_floating_point_operations
from megatron.training.library_configs import core_transformer_config_from_args

NOMINAL_TFLOPS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peaks that makers state; the usual denominator of MFU."""


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    title: str
    flags: str
    tiny: str
    """Flags that make it small enough for a test."""
    seconds: float
    """That each of its contenders may take, start and compilation included."""
    peer: str | None = "plain"
    """"plain", or another row: ours of that row."""
    plain_if_time_is_left: bool = False
    """Also measure plain torch, where `peer` is another row."""
    beside_transformers: bool = False
    """Also measure `transformers`, compiled, which ours should have 1.5 times the speed of, if time is left."""
    family: str | None = None
    precision: str = "--bf16"
    target_mfu: float | None = None
    target_ratio: float | None = None

    @property
    def contenders(self) -> tuple[str, ...]:
        """Those without which the row says nothing."""
        return ("ours", "plain") if self.peer == "plain" else ("ours",)

    @property
    def if_time_is_left(self) -> tuple[str, ...]:
        """Further ones."""
        return ("plain",) * self.plain_if_time_is_left + ("transformers",) * self.beside_transformers


COMMON = """
    --lr 1e-4 --train-iters 100 --mock-data --tokenizer-type NullTokenizer --attention-dropout 0
    --hidden-dropout 0 --cross-entropy-loss-fusion --untie-embeddings-and-output-weights
    --disable-bias-linear --seq-length 4096 --max-position-embeddings 4096
"""
LLAMA = """
    --swiglu --normalization RMSNorm --position-embedding-type rope --num-layers 32 --hidden-size 4096
    --num-attention-heads 32 --ffn-hidden-size 11008 --vocab-size 31999
"""
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SMALL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --vocab-size 255 --ffn-hidden-size 128
"""
ROWS: dict[str, Work] = {
    "gpt_2b": Work(
        "GPT 1.7B, sequence 4096, bf16",
        "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 131071 --micro-batch-size 4",
        SMALL,
        80,
        target_mfu=0.50,
        target_ratio=1.15,
    ),
    "llama_7b_recompute": Work(
        "Llama 7B, sequence 4096, bf16, full recompute",
        f"{LLAMA} --micro-batch-size 2 {RECOMPUTE}",
        SMALL,
        80,
        target_mfu=0.58,
        target_ratio=1.15,
    ),
    "llama_7b_fp8": Work(
        "Llama 7B, full recompute, FP8",
        f"{LLAMA} --micro-batch-size 2 {RECOMPUTE} --fp8-format hybrid --fp8-recipe tensorwise",
        SMALL,
        60,
        peer="llama_7b_recompute",
        target_ratio=1.35,
    ),
    "moe_1b": Work(
        "8 experts, 2 of them active, 1B active",
        "--swiglu --normalization RMSNorm --position-embedding-type rope --num-layers 20 --hidden-size 2048 "
        "--num-attention-heads 16 --ffn-hidden-size 2816 --moe-ffn-hidden-size 2816 --num-experts 8 "
        "--moe-router-topk 2 --moe-grouped-gemm --moe-router-load-balancing-type none --vocab-size 31999 "
        "--micro-batch-size 4",
        f"{SMALL} --moe-ffn-hidden-size 64",
        70,
        beside_transformers=True,
        target_mfu=0.45,
        target_ratio=1.15,
    ),
    "hybrid_1b": Work(
        "Mamba-2 hybrid, 1B",
        "--swiglu --normalization RMSNorm --is-hybrid-model --num-layers 24 --hidden-size 2048 "
        "--num-attention-heads 16 --ffn-hidden-size 5504 --hybrid-override-pattern M-M-M-*-M-M-M-*-M-M-M-*- "
        "--position-embedding-type none "
        "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec --vocab-size 50303 --micro-batch-size 4",
        f"{SMALL} --num-layers 4 --hybrid-override-pattern M-*- --mamba-head-dim 16 --mamba-state-dim 16 "
        "--mamba-num-groups 2",
        70,
        beside_transformers=True,
        family="mamba",
        target_mfu=0.45,
        target_ratio=1.15,
    ),
    "llama_7b": Work(
        "Llama 7B without recompute",
        f"{LLAMA} --micro-batch-size 1",
        SMALL,
        60,
        peer="llama_7b_recompute",
        plain_if_time_is_left=True,
        target_mfu=0.60,
    ),
    "gpt_2b_loss_in_pieces": Work(
        "GPT 1.7B with output layer and loss in pieces (for memory)",
        "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 131071 --micro-batch-size 4 "
        "--cross-entropy-fusion-impl linear",
        SMALL,
        45,
        peer="gpt_2b",
    ),
}
"""Of greatest worth first: time may be too short for all."""


def settings_of(work: Work, tiny: bool, compiles: bool = True) -> Any:
    """The checked settings of a row; with --torch-compile where that can be had, unless `compiles` is off.

    Raises:
        ConfigurationError: it asks for what is not built, or not to be had here.
    """
    words = f"{COMMON} {work.precision} {work.flags} {work.tiny if tiny else ''}".split()
    if compiles and not tiny and why_not_compilable(device_module.device_type(), os.environ) is None:
        words.append("--torch-compile")
    args = parse_args(argv=words)
    args.world_size = 1
    validate_args(args, {"model_family": work.family} if work.family else {})
    return args.variant(padded_vocab_size=args.vocab_size + 1)


# --- ours -----------------------------------------------------------------------------------------------


def our_model(args: Any, config: Any) -> nn.Module:
    """The model with random weights, drawn on its device: the values of a real start take minutes to draw on a CPU."""
    shape: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.seq_length,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
    }
    with deferred_initialization():
        if args.model_family == "mamba":
            pattern = {"hybrid_override_pattern": args.hybrid_override_pattern}
            model: nn.Module = MambaModel(config, mamba_stack_spec, **pattern, **shape)
        else:
            model = GPTModel(config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), **shape)
    for param in model.parameters():
        spec = getattr(param, "init_spec", None)
        if spec is not None:
            with torch.no_grad():
                _fill(param, spec.init_method)
    return model


def _fill(param: Tensor, init_method: Callable[[Tensor], Any]) -> None:
    if param.dim() > 1:
        param.normal_(std=0.02)
        return
    values = torch.empty(param.shape)
    init_method(values)
    param.copy_(values)


def ours(args: Any, device: str) -> Step:
    """A step as a training program takes it."""
    prepare_one_process()
    config = core_transformer_config_from_args(args)
    model = our_model(args, config)
    positions = torch.arange(args.seq_length, device=device).expand(args.micro_batch_size, -1)

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
        return total, count, {"loss": total.detach() / count}

    def forward_step(batch: Any, model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        ids, labels = next(batch)
        return model(ids, positions, None, labels=labels), loss_func

    return scheduled_step(model, config, forward_step, args.seq_length, args.micro_batch_size)


def peer(contender: str, args: Any, device: str, backend: str) -> Step:
    """A step of a model of others: "plain" torch or "transformers".

    Compiled layer by layer, as training programs in plain torch do: what is compiled for one layer serves the others,
    while one graph of 32 layers takes minutes.
    """
    model: PlainModel | TransformersModel
    if contender == "transformers":
        model = transformers_model(args, device)
    else:
        with torch.device(device):
            model = PlainModel(args).train()
    for module in model.parts_to_compile():
        module.compile(backend=backend)
    return torch_step(model, model, "autocast", device)


# --- measuring ------------------------------------------------------------------------------------------


def batches(args: Any, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens and those that follow them."""
    generator = torch.Generator().manual_seed(2)
    while True:
        shape = (args.micro_batch_size, args.seq_length + 1)
        tokens = torch.randint(0, args.vocab_size, shape, generator=generator).to(device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def measured(name: str, contender: str, device: str, tiny: bool, until: float) -> dict[str, Any]:
    """Speed and memory of one contender of a row; rounds end at `until`, of `time.monotonic`."""
    args = settings_of(ROWS[name], tiny)
    start = time.monotonic()
    backend = "eager" if tiny else "inductor"
    ceiling = Ceiling(torch.bfloat16, device, seconds=0.01 if tiny else 0.2, size=128 if tiny else None)
    ceiling.sample()
    step = ours(args, device) if contender == "ours" else peer(contender, args, device, backend)
    rounds, warmup = (2, 1) if tiny else (8, 3)
    turns = take_turns(
        {contender: step}, rounds, warmup=warmup, device=device, arguments=batches(args, device), until=until
    )
    peak = device_module.memory_stats()["max_allocated"]
    with suppress(torch.OutOfMemoryError):  # the model may have left no room for large matrices
        ceiling.sample()
    seconds, losses = turns.median(contender), turns.results[contender]
    flops = {whole: num_floating_point_operations(args, args.micro_batch_size, whole) for whole in (False, True)}
    nominal = nominal_flops(device)
    found: dict[str, Any] = {
        "seconds_of_step": seconds,
        "rounds": turns.seconds[contender],
        "tokens_per_second": args.micro_batch_size * args.seq_length / seconds,
        "model_tflops_per_second": flops[False] / seconds / 1e12,
        "matmul_peak_tflops_per_second": ceiling.flops / 1e12,
        "share_of_matmul_peak": flops[False] / seconds / ceiling.flops,
        "mfu_causal_half": nominal and flops[False] / seconds / nominal,
        "mfu_causal_whole": nominal and flops[True] / seconds / nominal,
        "peak_memory_gib": peak / 2**30,
        "seconds_in_all": time.monotonic() - start,
        "first_and_last_loss": [losses[0], losses[-1]],
    }
    if not all(math.isfinite(loss) for loss in losses):
        found["said"] = "its loss is not finite"
    elif contender == "ours" and not (tiny or args.torch_compile):
        why = why_not_compilable(device_module.device_type(), os.environ)
        found["said"] = f"without torch.compile, which lacks {why}"
    return found


def nominal_flops(device: str) -> float | None:
    """Of the maker; None: not known here."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name(torch.device(device))
    return next((1e12 * value for key, value in NOMINAL_TFLOPS.items() if key in name), None)
