"""A T5 that writes on a CPU: with what its decoder keeps, without, and `transformers.generate`; same weights, greedy.

    OMP_NUM_THREADS=1 python benchmarks/generate_t5_cpu.py --output benchmarks/results/generate_t5_cpu.json

The model has the shape of T5 v1.1 small and random weights, fp32. Tokens per second of CPU time; the contenders take
turns, the number given is the median over the rounds.

- one: one prompt of 64 tokens, 64 written.
- ragged: 8 prompts of 8 to 128 tokens, 64 written for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.encoder_contenders import SIZES, T5_VOCAB, our_t5, their_t5
from benchmarks.harness import write_result
from benchmarks.training_steps import prepare_one_process
from megatron.core.export import ModelShape, from_hf, load_whole_state
from megatron.core.export.families.t5 import t5_weights
from megatron.core.inference.contexts import EncoderDecoderContext
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.model_inference_wrappers.t5.t5_inference_wrapper import T5InferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.encoder_decoder_text_generation_controller import (
    EncoderDecoderTextGenerationController,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.weight_order import order_weights

NEW, LONGEST = 64, 256
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=NEW, ignore_termination=True)
Write = Callable[[list[list[int]]], list[list[int]]]
"""(prompts) -> texts."""


class Numbers:
    """A tokenizer whose texts are numbers between spaces."""

    eod = -1

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def wrapper_config(model: Any) -> InferenceWrapperConfig:
    return InferenceWrapperConfig(model.config.hidden_size, torch.float32, -1, T5_VOCAB, 16, LONGEST)


def keeping(model: nn.Module) -> Write:
    """The engine of the server."""
    context = EncoderDecoderContext(0, LONGEST, 16)
    wrapper = T5InferenceWrapper(model, wrapper_config(model), context)
    engine = DynamicInferenceEngine(TextGenerationController(wrapper, None), context, termination_id=-1)
    return lambda prompts: [request.generated_tokens for request in engine.generate(prompts, GREEDY)]


def whole_passes(model: nn.Module) -> Write:
    """The static engine, whose decoder computes all tokens of its texts again for each new one."""
    controller = EncoderDecoderTextGenerationController(T5InferenceWrapper(model, wrapper_config(model)), Numbers())
    engine = StaticInferenceEngine(controller)

    def write(prompts: list[list[int]]) -> list[list[int]]:
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        requests = engine.generate(["0"] * len(prompts), encoder_prompts=texts, sampling_params=GREEDY)
        return [request.generated_tokens.tolist() for request in requests]

    return write


def hugging_face(model: Any) -> Write:
    """`generate` on a batch."""

    def write(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return found[:, 1:].tolist()

    return write


def contenders() -> dict[str, Write]:
    """Over the same weights."""
    prepare_one_process()
    torch.manual_seed(0)
    peer: Any = their_t5(SIZES["t5"]["small"])[0].eval()
    peer.config.use_cache = peer.generation_config.use_cache = True
    peer.generation_config.eos_token_id, peer.generation_config.decoder_start_token_id = None, 0
    with torch.no_grad():
        for name, param in peer.named_parameters():  # sharp enough that no two tokens are nearly equally likely
            param.mul_(4.0 if name == "lm_head.weight" else 1.0)
    config, model, _ = our_t5(SIZES["t5"]["small"], half=False)
    load_whole_state(model, from_hf(t5_weights(ModelShape.of_config(config, tied=False)), dict(peer.state_dict())))
    model.eval()
    order_weights([model])
    return {"keeping": keeping(model), "whole passes": whole_passes(model), "transformers": hugging_face(peer)}


def workloads() -> dict[str, list[list[int]]]:
    rng = random.Random(5)
    lengths = {"one": [64], "ragged": [rng.randint(8, 128) for _ in range(8)]}
    return {name: [[rng.randrange(2, T5_VOCAB) for _ in range(n)] for n in own] for name, own in lengths.items()}


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    everyone = contenders()
    for name, prompts in workloads().items():
        speeds: dict[str, list[float]] = {contender: [] for contender in everyone}
        texts = {}
        for _ in range(rounds):
            for contender, write in everyone.items():
                begin = time.process_time()
                texts[contender] = write(prompts)
                speeds[contender].append(len(prompts) * NEW / (time.process_time() - begin))
        medians = {contender: statistics.median(values) for contender, values in speeds.items()}
        results[name] = {
            "tokens_per_cpu_second": medians,
            "all_rounds": speeds,
            "ratios": {
                other: statistics.median(a / b for a, b in zip(speeds["keeping"], speeds[other]))
                for other in ("whole passes", "transformers")
            },
            "equal_texts": {
                other: sum(a == b for a, b in zip(texts["keeping"], texts[other])) / len(prompts)
                for other in ("whole passes", "transformers")
            },
        }
        print(name, json.dumps({key: value for key, value in results[name].items() if key != "all_rounds"}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    results = measure(args.rounds)
    if args.output:
        write_result(args.output, settings={"rounds": args.rounds}, results=results)


if __name__ == "__main__":
    main()
