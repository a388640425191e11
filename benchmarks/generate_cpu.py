"""Generation on a CPU: the dynamic engine beside `transformers.generate`, same weights, greedy, in one run.

    OMP_NUM_THREADS=1 python benchmarks/generate_cpu.py --output benchmarks/results/generate_cpu.json

The model has the shape of GPT-2 124M and random weights. The unit is useful tokens per second: tokens that a request
asked for. With one thread it is CPU time, with more the clock. transformers runs a batch until its longest request is
done. Contenders alternate; the number given is the median over the rounds. A file of results keeps what an earlier
call has found for other types and workloads. Beside them: how fast one product reads all weights from memory, and what
that would give for one row.

- one: one prompt of 32 tokens, 64 more.
- equal: 16 prompts of 32 tokens, 64 more each.
- ragged: 16 prompts of 8 to 128 tokens, 8 to 128 more.
- arrivals: 64 such requests, arriving at random, sixteen (`--rate`) in the time that one takes alone: nobody can give
  more tokens per second than are asked for, so those that come slowly say nothing about who could give more. The clock
  is the time used; where nothing is to do it jumps to the next arrival. transformers takes up to 16 of those that wait,
  as one batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import write_result
from benchmarks.training_steps import prepare_one_process
from megatron.core.export import ModelShape, from_hf, load_whole_state
from megatron.core.export.families.gpt2 import weights as gpt2_weights
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.weight_order import order_weights
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB, LENGTH, STATIC_BATCH = 50257, 1024, 16


@dataclass(frozen=True)
class Request:
    """A prompt, the tokens wanted after it, and when it comes, in seconds of the clock."""

    prompt: list[int]
    wanted: int
    arrival: float = 0.0


Served = tuple[list[list[int]], float, list[float]]
"""(texts, seconds used, seconds from arrival to first token)."""


def seconds() -> float:
    """CPU time of one thread, so that other load on the machine does not count; of more threads elapsed time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Time since the start, and what was jumped over."""

    def __init__(self) -> None:
        self.begin, self.jumped = seconds(), 0.0

    @property
    def used(self) -> float:
        return seconds() - self.begin

    @property
    def now(self) -> float:
        return self.used + self.jumped

    def jump_to(self, when: float) -> None:
        self.jumped += max(0.0, when - self.now)


def ours(layers: int, state: dict[str, Tensor], dtype: torch.dtype) -> Callable[[list[Request]], Served]:
    """Our engine; chunks of 64 tokens."""
    prepare_one_process()
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=768,
        num_attention_heads=12,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH, share_embeddings_and_output_weights=True)
    load_whole_state(model, from_hf(gpt2_weights(ModelShape.of_config(config)), state))
    model.to(dtype).eval()
    order_weights([model])
    context = DynamicInferenceContext(
        params_dtype=dtype,
        num_layers=layers,
        kv_channels=64,
        num_attention_heads=12,
        max_sequence_length=LENGTH,
        buffer_size_gb=2.0,
        buffer_guaranteed_fraction=0.1,
        chunk_size_tokens=64,
        max_requests_override=64,
        max_tokens_override=2048,
        enable_prefix_caching=False,
    )
    wrapper = GPTInferenceWrapper(model, InferenceWrapperConfig(768, dtype, -1, VOCAB), context)
    engine = DynamicInferenceEngine(TextGenerationController(wrapper, None), context, termination_id=-1)

    def serve(requests: list[Request]) -> Served:
        clock, texts, first = Clock(), {}, {}
        waiting = sorted(enumerate(requests), key=lambda item: item[1].arrival)
        engine.listeners = [lambda request: first.setdefault(request.request_id, clock.now)]
        while waiting or engine.has_unfinished_requests():
            if not engine.has_unfinished_requests():
                clock.jump_to(waiting[0][1].arrival)
            while waiting and waiting[0][1].arrival <= clock.now:
                number, request = waiting.pop(0)
                params = SamplingParams(top_k=1, num_tokens_to_generate=request.wanted)
                engine.add_request(number, request.prompt, sampling_params=params)
            for done in engine.step()[0]:
                texts[done.request_id] = done.generated_tokens
        numbers = range(len(requests))
        return [texts[n] for n in numbers], clock.used, [first[n] - requests[n].arrival for n in numbers]

    return serve


def hugging_face(model: Any) -> Callable[[list[Request]], Served]:
    """`generate` on batches padded on the left."""

    def serve(requests: list[Request]) -> Served:
        clock, texts, first = Clock(), {}, {}
        waiting = sorted(enumerate(requests), key=lambda item: item[1].arrival)
        while waiting:
            clock.jump_to(waiting[0][1].arrival)
            batch = [item for item in waiting if item[1].arrival <= clock.now][:STATIC_BATCH]
            waiting = waiting[len(batch) :]
            longest = max(len(request.prompt) for _, request in batch)
            ids = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for _, r in batch])
            mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for _, r in batch])
            most = max(request.wanted for _, request in batch)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
            )
            for row, (number, request) in zip(out.tolist(), batch):
                texts[number] = row[longest : longest + request.wanted]
                first[number] = clock.now  # a caller sees nothing before the batch ends
        numbers = range(len(requests))
        return [texts[n] for n in numbers], clock.used, [first[n] - requests[n].arrival for n in numbers]

    return serve


def workloads(rate: float) -> dict[str, list[Request]]:
    """The requests of each; `rate` of arrivals per second."""
    rng = random.Random(5)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(length)]

    def ragged(arrival: float = 0.0) -> Request:
        return Request(prompt(rng.randint(8, 128)), rng.randint(8, 128), arrival)

    arrivals, clock = [], 0.0
    for _ in range(64):
        clock += rng.expovariate(rate)
        arrivals.append(clock)
    return {
        "one": [Request(prompt(32), 64)],
        "equal": [Request(prompt(32), 64) for _ in range(16)],
        "ragged": [ragged() for _ in range(16)],
        "arrivals": [ragged(arrival) for arrival in arrivals],
    }


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of texts that are equal."""
    return sum(x == y for x, y in zip(a, b)) / len(a)


def measure(
    layers: int, dtype: torch.dtype, rounds: int, names: list[str], rate: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, numbers) of each workload, as soon as they are known; `rate` requests arrive while one runs alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config(n_layer=layers, vocab_size=VOCAB, n_positions=LENGTH)).eval()
    with torch.no_grad():
        for param in peer.parameters():  # sharp enough that no two tokens are nearly equally likely
            param.mul_(3.0 if param.dim() > 1 else 1.0)
    contenders = {"ours": ours(layers, dict(peer.state_dict()), dtype), "transformers": hugging_face(peer.to(dtype))}
    yield "streaming", streaming(sum(p.numel() for p in peer.parameters()) - LENGTH * 768, dtype)
    single = Request([7] * 64, 64)
    with torch.no_grad():
        contenders["ours"]([single])  # the first run takes memory
        per_second = rate / contenders["ours"]([single])[1]
    for name, requests in workloads(per_second).items():
        if name not in names:
            continue
        useful = sum(request.wanted for request in requests)
        speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
        first: dict[str, list[float]] = {contender: [] for contender in contenders}
        texts = {}
        for _ in range(rounds):
            for contender, serve in contenders.items():
                with torch.no_grad():
                    texts[contender], seconds, waits = serve(requests)
                speeds[contender].append(useful / seconds)
                first[contender].append(statistics.median(waits))
        result = {
            "rounds": rounds,
            "tokens_per_second": {contender: statistics.median(values) for contender, values in speeds.items()},
            "all_rounds": speeds,
            "median_seconds_to_first_token": {c: statistics.median(values) for c, values in first.items()},
            "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["transformers"])),
            "equal_texts": agreement(texts["ours"], texts["transformers"]),
        }
        if name == "arrivals":
            result["asked_for_per_second"] = useful / requests[-1].arrival
        print(name, json.dumps({k: v for k, v in result.items() if k != "all_rounds"}), flush=True)
        yield name, result


def streaming(weights: int, dtype: torch.dtype, rounds: int = 5) -> dict[str, float]:
    """What reading as many bytes as the model's weights have takes: the bound for one row.

    Returns:
        bytes: of all weights that a step reads; gb_per_second: at which a large sum reads, best of `rounds`;
        tokens_per_second: for which one row could ask then.
    """
    data = torch.zeros(64 * 2**20)
    best = math.inf
    for _ in range(rounds):
        begin = seconds()
        data.sum()
        best = min(best, seconds() - begin)
    speed, size = data.numel() * data.element_size() / best, weights * dtype.itemsize
    return {"bytes": size, "gb_per_second": speed / 1e9, "tokens_per_second": speed / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--workloads", nargs="+", default=["one", "equal", "ragged", "arrivals"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=16.0, help="requests that arrive in the time one takes alone")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file, beside what it has")
    args = parser.parse_args()
    settings = {"layers": args.layers, "static_batch": STATIC_BATCH, "threads": torch.get_num_threads()}
    results = known_results(args.output, settings)
    for number_type in args.types:
        print(number_type, flush=True)
        of_type = results.setdefault(number_type, {})
        measured = measure(args.layers, getattr(torch, number_type), args.rounds, args.workloads, args.rate)
        for name, result in measured:
            of_type[name] = result | {"load": os.getloadavg()[0]}
            if args.output:
                write_result(args.output, settings=settings, results=results)


def known_results(path: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results that the file has under the same settings."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["results"] if found["settings"] == settings else {}


if __name__ == "__main__":
    main()
