"""Speed of log-likelihoods for lm-eval on a CPU: our model beside lm-eval's own `hf` backend, in one run.

    OMP_NUM_THREADS=1 python benchmarks/lm_eval_cpu.py

Both have the same weights (a GPT-2 with random ones), get the same requests as token ids, and must give the same
answers. The rounds of the two alternate, so that other load on the machine meets them alike. The unit is requests per
second of CPU time; the numbers given are medians over the rounds. Needs the packages lm-eval and accelerate.

Kinds of requests, all of mixed lengths: `choices`, four continuations of several tokens after each context; `letters`,
four continuations of one token after each; `words`, one continuation of a few tokens; `rolling`, texts of which each
token is predicted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from benchmarks.harness import versions, write_result
from megatron.training import get_args, get_model, initialize_megatron
from megatron.training.checkpoint.load import load_run
from pretrain_gpt import model_provider
from tasks.lm_eval_harness.adapter import GPTOfHarness

VOCAB, LENGTH, BATCH = 50257, 512, 8
SIZES = {"small": (6, 384, 6), "base": (12, 768, 12)}
Request = tuple[tuple[str, str], list[int], list[int]]


def requests(kind: str, count: int) -> list[Request]:
    """`count` contexts with their continuations, as both backends take them."""
    draw = random.Random(kind)

    def tokens(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(VOCAB - 1) for _ in range(draw.randint(shortest, longest))]

    found: list[Request] = []
    for number in range(count):
        context = tokens(20, 300)
        for choice in range(1 if kind == "words" else 4):
            continuation = tokens(*{"choices": (2, 40), "letters": (1, 1), "words": (1, 4)}[kind])
            found.append(((f"context {number}", f"choice {choice}"), context, continuation))
    return found


def texts(count: int) -> list[Request]:
    """As lm-eval's backend asks for rolling texts: each is predicted from one token on."""
    draw = random.Random("rolling")
    return [
        ((f"text {i}", ""), [VOCAB - 1], [draw.randrange(VOCAB - 1) for _ in range(draw.randint(40, 400))])
        for i in range(count)
    ]


def hf_backend(model: Any) -> Any:
    words = {"<|endoftext|>": VOCAB - 1, "a": 0}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=BATCH, device="cpu")


def our_backend(directory: str, size: tuple[int, int, int]) -> Any:
    layers, hidden, heads = size
    sys.argv = (
        f"lm_eval_cpu.py --num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} "
        f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --micro-batch-size {BATCH} "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --load hf:{directory}"
    ).split()
    initialize_megatron()
    args = get_args()
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(args, model, None, None)

    class Tokenizer:
        eod = VOCAB - 1

    return GPTOfHarness(model, Tokenizer(), length=LENGTH, batch_size=BATCH)


def answer(backend: Any, asked: list[Request]) -> list[tuple[float, bool]]:
    if isinstance(backend, HFLM):
        return backend._loglikelihood_tokens(asked, disable_tqdm=True)
    return backend._loglikelihood_tokens(asked)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def compare(ours: Any, theirs: Any, asked: list[Request], rounds: int) -> dict[str, Any]:
    """Medians of both, and by how much their answers differ."""
    rates: dict[str, list[float]] = {"ours": [], "hf": []}
    answers: dict[str, list[tuple[float, bool]]] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, backend in (("ours", ours), ("hf", theirs)):
            seconds, answers[name] = cpu_seconds(lambda backend=backend: answer(backend, asked))
            if number:
                rates[name].append(len(asked) / seconds)
    apart = max(abs(a - b) for (a, _), (b, _) in zip(answers["ours"], answers["hf"]))
    if apart > 1e-2 or any(bool(a) != bool(b) for (_, a), (_, b) in zip(answers["ours"], answers["hf"])):
        raise SystemExit(f"the answers differ by {apart}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    pairs = [a / b for a, b in zip(rates["ours"], rates["hf"])]
    return {
        "requests": len(asked),
        "requests_per_cpu_second": medians,
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "largest_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kinds", nargs="+", default=["choices", "letters", "words", "rolling"])
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    layers, hidden, heads = SIZES[args.size]
    config = transformers.GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, n_positions=LENGTH, vocab_size=VOCAB)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        ours = our_backend(directory, SIZES[args.size])
    theirs = hf_backend(model)
    found = {}
    for kind in args.kinds:
        asked = texts(args.contexts) if kind == "rolling" else requests(kind, args.contexts)
        found[kind] = compare(ours, theirs, asked, args.rounds)
        print(f"{kind:8} ratio {found[kind]['ratio']:.2f} {found[kind]['requests_per_cpu_second']}", flush=True)
    if args.output:
        settings = {"size": args.size, "length": LENGTH, "batch": BATCH, "vocabulary": VOCAB, "rounds": args.rounds}
        write_result(args.output, versions=versions("transformers", "lm_eval"), settings=settings, kinds=found)


if __name__ == "__main__":
    main()
