"""Training speed of one process on a CPU: this framework beside other ways to train the same GPT-2, in one run.

    OMP_NUM_THREADS=2 python benchmarks/train_cpu.py --sizes small base --types fp32 bf16 --lengths 512 1024
    OMP_NUM_THREADS=2 python benchmarks/train_cpu.py --model bert    # or t5: see encoder_contenders.py

Every contender trains the same architecture (GPT-2: learned positions, LayerNorm, tanh GELU, biases, tied
embeddings, no dropout) on the same tokens: forward, backward, clipping by norm, AdamW. Steps of the
contenders alternate, and between them the peak of matrix multiplication is sampled, so that other load on the
machine meets all of them alike. The unit is tokens per second of CPU time (`--clock wall`: of elapsed time); the
numbers given are the median over the rounds, and the median of the ratios within them.

Compiling a peer takes minutes the first time; torch keeps what it compiled in TORCHINDUCTOR_CACHE_DIR. Without a C++
compiler the compiled peers are left out and a line says so. With `--output`, rows of the file that this run does not
measure stay.

Our training program asks the C library to keep freed memory (`megatron.core.host_memory`). All contenders run
in this one process and profit from it alike; `--allocator default` leaves it out for all.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import encoder_contenders
from benchmarks.harness import Ceiling, Rounds, machine, take_turns, versions, write_result
from benchmarks.training_steps import BATCH, LENGTH, Step, our_config, prepare_one_process, scheduled_step, torch_step
from megatron.core.fusions.compiled import why_not_compilable
from megatron.core.host_memory import keep_freed_memory

VOCAB = 50304


@dataclass(frozen=True)
class Size:
    """Shape of a model and of its batch."""

    layers: int
    hidden: int
    heads: int
    length: int = LENGTH
    batch: int = BATCH

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.batch

    @property
    def matmul_parameters(self) -> int:
        """Weights that take part in matrix products: the layers' and the output layer's."""
        return 12 * self.layers * self.hidden**2 + VOCAB * self.hidden

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, causal attention counted as the half of the square that it is."""
        return 6 * self.matmul_parameters + 6 * self.layers * self.hidden * self.length


SIZES = {"small": Size(6, 384, 6), "base": Size(12, 768, 12)}


# --- the plain peer: a compact GPT in torch -------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        h = size.hidden
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(h, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(b, s, h))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, size.hidden), nn.Embedding(size.length, size.hidden)
        self.blocks = nn.ModuleList(PlainBlock(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        for name, param in self.named_parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def plain(size: Size, how: str, *, compiled: bool = False) -> Step:
    model = PlainGPT(size)
    return torch_step(model, torch.compile(model, dynamic=False) if compiled else model, how)


def hugging_face(size: Size, how: str, *, compiled: bool = False) -> Step:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": size.layers, "n_embd": size.hidden, "n_head": size.heads, "n_positions": size.length}
    config = GPT2Config(**shape, vocab_size=VOCAB, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config).train()

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return torch_step(model, torch.compile(loss_of, dynamic=False) if compiled else loss_of, how)


LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
}


def ours(size: Size, how: str, *, llama: bool = False, compiled: bool = False, loss: str = "native") -> Step:
    """The framework as a training program uses it: schedule, data parallel buffers, its optimizer.

    `llama`: with RMSNorm, SwiGLU (of 8/3 the width) and rotary positions. `compiled`: with --torch-compile.
    `loss`: of --cross-entropy-fusion-impl.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    prepare_one_process()
    shape: dict[str, Any] = {"ffn_hidden_size": size.hidden * 8 // 3 // 64 * 64, **LLAMA} if llama else {}
    shape |= {"torch_compile": compiled, "cross_entropy_fusion_impl": loss}
    config = our_config(size.layers, size.hidden, size.heads, half=how == "bf16", **shape)
    model: nn.Module = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCAB,
        size.length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope" if llama else "learned_absolute",
    )
    positions = torch.arange(size.length).expand(size.batch, -1)

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
        return total, count, {"loss": total.detach() / count}

    def forward_step(batch: Any, model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        ids, labels = next(batch)
        return model(ids, positions, None, labels=labels), loss_func

    return scheduled_step(model, config, forward_step, size.length, size.batch)


CONTENDERS: dict[str, dict[str, tuple[Callable[[Size, str], Step], str]]] = {
    "fp32": {
        "ours": (ours, "fp32"),
        "ours, compiled": (partial(ours, compiled=True), "fp32"),
        "ours, loss in pieces": (partial(ours, loss="linear"), "fp32"),
        "ours, llama": (partial(ours, llama=True), "fp32"),
        "ours, llama, compiled": (partial(ours, llama=True, compiled=True), "fp32"),
        "plain torch": (plain, "fp32"),
        "plain torch, compiled": (partial(plain, compiled=True), "fp32"),
        "hugging face": (hugging_face, "fp32"),
        "hugging face, compiled": (partial(hugging_face, compiled=True), "fp32"),
    },
    "bf16": {
        "ours": (ours, "bf16"),
        "ours, compiled": (partial(ours, compiled=True), "bf16"),
        "ours, loss in pieces": (partial(ours, loss="linear"), "bf16"),
        "ours, llama": (partial(ours, llama=True), "bf16"),
        "ours, llama, compiled": (partial(ours, llama=True, compiled=True), "bf16"),
        "plain torch": (plain, "bf16"),
        "plain torch, compiled": (partial(plain, compiled=True), "bf16"),
        "plain torch, autocast": (plain, "autocast"),
        "plain torch, autocast, compiled": (partial(plain, compiled=True), "autocast"),
        "hugging face": (hugging_face, "bf16"),
        "hugging face, compiled": (partial(hugging_face, compiled=True), "bf16"),
    },
}
USUAL = ("ours", *(name for name in CONTENDERS["bf16"] if not name.startswith("ours")))
"""Contenders where none are named."""


def gpt_batches(size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens and the tokens that follow them."""
    generator = torch.Generator().manual_seed(2)
    while True:
        tokens = torch.randint(0, VOCAB, (size.batch, size.length + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# --- measuring ------------------------------------------------------------------------------------------

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def contenders(model: str, size: Any, number_type: str, names: list[str] | None) -> dict[str, Step]:
    """The chosen contenders, ready to train."""
    table: dict[str, tuple[Callable[..., Step], str]] = dict(CONTENDERS[number_type])
    if model != "gpt":
        table = {name: (make, number_type) for name, make in encoder_contenders.CONTENDERS[model].items()}
    steps = {}
    lacking = why_not_compilable("cpu", os.environ)
    for name, (make, how) in table.items():
        if name not in (names or (USUAL if model == "gpt" else table)):
            continue
        if lacking and "compiled" in name:
            print(f"left out, {name}: torch.compile lacks {lacking}")
            continue
        torch.manual_seed(1)
        steps[name] = make(size, how)
    return steps


def measure(
    model: str, size: Any, number_type: str, rounds: int, warmup: int, names: list[str] | None, clock: str = "cpu"
) -> dict[str, Any]:
    """Steps of all contenders in turn, `rounds` times."""
    dtype = torch.float32 if number_type == "fp32" else torch.bfloat16
    steps = contenders(model, size, number_type, names)
    batches = gpt_batches(size) if model == "gpt" else ((batch,) for batch in encoder_contenders.batches(model))
    num_tokens = size.tokens if model == "gpt" else encoder_contenders.TOKENS[model]
    ceiling = Ceiling(dtype, timer=CLOCKS[clock])
    turns = take_turns(steps, rounds, warmup=warmup, arguments=batches, between=ceiling.sample, timer=CLOCKS[clock])
    speeds = {name: [num_tokens / each for each in seconds] for name, seconds in turns.seconds.items()}
    losses, peak = turns.results, ceiling.flops
    best = ratio_to_best(turns)
    return {
        "gemm_peak_gflops_per_second": peak / 1e9,
        "best": best,
        "contenders": {
            name: {
                "tokens_per_second": statistics.median(values),
                "all_rounds": values,
                "share_of_gemm_peak": statistics.median(values) * size.flops_per_token / peak
                if model == "gpt"
                else None,
                "first_and_last_loss": [losses[name][0], losses[name][-1]],
            }
            for name, values in speeds.items()
        },
    }


def ratio_to_best(turns: Rounds) -> dict[str, Any] | None:
    """Our fastest way beside the fastest peer; None where one side is missing."""
    ours = [name for name in turns.seconds if name.startswith("ours")]
    peers = [name for name in turns.seconds if name not in ours]
    if not ours or not peers:
        return None
    name, peer = min(ours, key=turns.median), min(peers, key=turns.median)
    return {"ours": name, "peer": peer, "times_as_fast": turns.times_as_fast(name, peer)}


def show(title: str, result: dict[str, Any]) -> None:
    """One table."""
    contenders = result["contenders"]
    print(f"\n{title}; matrix product peak {result['gemm_peak_gflops_per_second']:.0f} GFLOP/s")
    peers = [c["tokens_per_second"] for name, c in contenders.items() if not name.startswith("ours")]
    best = max(peers, default=float("nan"))
    print(f"  {'':34}{'tokens/s':>10}{'of peak':>10}{'of best peer':>14}{'loss':>20}")
    for name, c in contenders.items():
        first, last = c["first_and_last_loss"]
        share = "" if c["share_of_gemm_peak"] is None else f"{c['share_of_gemm_peak']:.1%}"
        print(
            f"  {name:34}{c['tokens_per_second']:10.1f}{share:>10}"
            f"{c['tokens_per_second'] / best:14.3f}{first:11.4f} ->{last:7.4f}"
        )
    print(f"  {result['best']}")
    sys.stdout.flush()


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row of results is about; older ones do not tell their length and batch."""
    size = dict(row["size"])
    length, batch = size.pop("length", LENGTH), size.pop("batch", BATCH)
    return (*size.values(), length, batch, row["type"])


def kept_rows(path: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the file that `results` have no news of."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    return [row for row in rows if key(row) not in {key(result) for result in results}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["gpt", *encoder_contenders.SIZES], default="gpt")
    parser.add_argument("--sizes", nargs="+", help="of the model; default: all that it has")
    parser.add_argument("--types", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[LENGTH], help="of the sequences (GPT)")
    parser.add_argument("--tokens", type=int, default=LENGTH * BATCH, help="of a step (GPT)")
    parser.add_argument("--contenders", nargs="+", help="only these, by name; default for GPT: ours and all peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="what the speed is per second of")
    parser.add_argument("--allocator", choices=["keep", "default"], default="keep")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    if args.allocator == "keep" and not keep_freed_memory():
        print("this C library cannot be asked to keep freed memory")
    results = []
    sizes: dict[str, Any] = dict(SIZES if args.model == "gpt" else encoder_contenders.SIZES[args.model])
    if unknown := set(args.sizes or ()) - sizes.keys():
        parser.error(f"--model {args.model} has no size {', '.join(sorted(unknown))}; it has {', '.join(sizes)}")
    for size, number_type, length in itertools.product(args.sizes or sizes, args.types, args.lengths):
        shape, title = sizes[size], args.model
        if args.model == "gpt":
            shape = replace(shape, length=length, batch=max(1, args.tokens // length))
            title = f"gpt, {shape.batch} × {shape.length}"
        result = measure(args.model, shape, number_type, args.rounds, args.warmup, args.contenders, args.clock)
        show(f"{title}, {shape.layers} layers, hidden {shape.hidden}, {number_type}", result)
        where = machine() | versions("transformers")
        results.append({"size": asdict(shape), "type": number_type, "rounds": args.rounds, "machine": where, **result})
        if args.output:  # after each row: what a time limit leaves is of use
            settings = {"vocabulary": encoder_contenders.VOCAB.get(args.model, VOCAB), "clock": args.clock}
            settings |= {"allocator": args.allocator, "model": args.model}
            rows = sorted([*kept_rows(args.output, results), *results], key=key)
            write_result(args.output, settings=settings, results=rows)
        gc.collect()


if __name__ == "__main__":
    main()
