"""WikiText perplexity and LAMBADA accuracy of a GPT from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.inference.scoring import Score, ScoredText, score
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.load import load_run
from megatron.training.evaluation import perplexity
from megatron.training.initialize import close_program
from megatron.training.settings import refuse_unless, was_given
from pretrain_gpt import model_provider
from tasks.checkpoints import require_checkpoint, require_same_tokenizer
from tasks.files import one_file
from tasks.report import report_results
from tasks.zeroshot_gpt.datasets import Lambada, WikiText, windows

Results = dict[str, float]


@dataclass(frozen=True)
class ZeroShot:
    """A measurement: what the model is asked, and what its answers say."""

    name: str
    texts: Callable[[Any, Any], Sequence[ScoredText]]
    """(args, tokenizer) -> what is to be predicted."""
    results: Callable[[Sequence[ScoredText], Sequence[Score]], Results]


def wikitext(path: Path) -> ZeroShot:
    """Perplexity per token, and per word: the loss of all tokens together counts for the words of the published text
    (Shoeybi et al., arXiv:1909.08053, section E)."""
    text = WikiText.read(path)

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


def lambada(path: Path) -> ZeroShot:
    """Share of passages whose last token, or word, is the model's first choice."""
    data = Lambada.read(path)

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


MEASUREMENTS: dict[str, Callable[[Path], ZeroShot]] = {"WIKITEXT103": wikitext, "LAMBADA": lambada}


def prepare(args: Any) -> Callable[[], None]:
    """What runs the task of `--task`; its file has been read."""
    measurement = MEASUREMENTS[args.task](one_file(args.valid_data, "--valid-data"))
    require_checkpoint(args)
    return lambda: _run(args, measurement)


def _run(args: Any, measurement: ZeroShot) -> None:
    initialize_megatron(parsed_args=args, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    require_same_tokenizer(get_args(), "load")
    texts = measurement.texts(get_args(), get_tokenizer())
    model = get_model(model_provider, wrap_with_ddp=False)
    load_run(get_args(), model, None, None)
    report_results(measurement.name, measure(measurement, texts, model))
    close_program()


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
