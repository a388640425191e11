"""WikiText perplexity and LAMBADA accuracy of a GPT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.inference.scoring import Score, ScoredText, score
from megatron.training import get_args, print_rank_0
from megatron.training.evaluation import perplexity
from megatron.training.settings import refuse_unless, was_given
from tasks.zeroshot_gpt.datasets import Lambada, WikiText, windows

Results = dict[str, float]


@dataclass(frozen=True)
class ZeroShot:
    """A measurement: what the model is asked, and what its answers say."""

    name: str
    texts: Callable[[Any, Any], Sequence[ScoredText]]
    """(args, tokenizer) -> what is to be predicted."""
    results: Callable[[Sequence[ScoredText], Sequence[Score]], Results]


def wikitext(path: Path, flag: str) -> ZeroShot:
    """Perplexity per token, and per word: the loss of all tokens together counts for the words of the published text
    (Shoeybi et al., arXiv:1909.08053, section E)."""
    text = WikiText.read(path, flag)

    def texts(args: Any, tokenizer: Any) -> list[ScoredText]:
        return windows(text.tokenize(tokenizer), args.seq_length, stride_of(args))

    def results(texts: Sequence[ScoredText], scores: Sequence[Score]) -> Results:
        num_predicted = sum(len(one.tokens) - one.first for one in texts)
        loss = -sum(one.log_likelihood for one in scores) / num_predicted
        ratio = num_predicted / (text.num_words - 1)
        return {
            "avg loss": loss,
            "ppl": perplexity(loss),
            "adjusted ppl": perplexity(loss * ratio),
            "token ratio": ratio,
        }

    return ZeroShot("WIKITEXT103", texts, results)


def lambada(path: Path, flag: str) -> ZeroShot:
    """Share of passages whose last token, or word, is the model's first choice."""
    data = Lambada.read(path, flag)

    def texts(args: Any, tokenizer: Any) -> list[ScoredText]:
        return data.texts(tokenizer, args.seq_length, whole_word=args.strict_lambada)

    def results(texts: Sequence[ScoredText], scores: Sequence[Score]) -> Results:
        correct = sum(one.is_greedy for one in scores)
        return {"number correct": correct, "total examples": len(texts), "avg accuracy": correct / len(texts)}

    return ZeroShot("LAMBADA", texts, results)


def stride_of(args: Any) -> int:
    """Tokens by which windows are moved: `--overlapping-eval`, whose default shrinks with the window."""
    stride, length = args.overlapping_eval, args.seq_length
    if not was_given(args, "overlapping_eval"):
        return min(stride, length)
    refuse_unless(
        1 <= stride <= length,
        f"--overlapping-eval ({stride}), the tokens by which windows are moved, must be between 1 and --seq-length "
        f"({length})",
    )
    return stride


MEASUREMENTS: dict[str, Callable[[Path, str], ZeroShot]] = {"WIKITEXT103": wikitext, "LAMBADA": lambada}
"""Task -> (its file, the flag that names it) -> what is measured. Raises `ConfigurationError` for another format."""


def measure(measurement: ZeroShot, texts: Sequence[ScoredText], model: list[nn.Module]) -> Results:
    """The results of a model, the same on every rank."""
    args = get_args()
    print_rank_0(f"evaluating {measurement.name}: {len(texts)} samples")
    scores = score(model, texts, batch_size=args.micro_batch_size, on_progress=_ticker(args, len(texts)))
    return measurement.results(texts, scores)


def _ticker(args: Any, total: int) -> Callable[[int], None]:
    every = args.log_interval * args.micro_batch_size * args.data_parallel_size
    shown = 0

    def tick(done: int) -> None:
        nonlocal shown
        if done // every > shown:
            shown = done // every
            print_rank_0(f"> working on sample {done} of {total}")

    return tick
