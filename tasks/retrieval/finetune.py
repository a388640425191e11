"""`--task RET-FINETUNE-NQ`: a retriever learns from questions and passages that answer them (Karpukhin et al.,
arXiv:2004.04906, section 3), with the training loop of `pretrain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing.collective import gather_entries
from megatron.inference.forward_only import evaluating
from megatron.training import get_args, get_model, get_tokenizer, initialize_megatron, print_rank_0
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.paths import checkpoint_exists
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.initialize import close_program
from megatron.training.retrieval.start import load_start
from megatron.training.run import Run
from megatron.training.settings import refuse_unless, was_given
from megatron.training.utils import get_timed_batch
from pretrain_ict import BATCH_KEYS, loss_func, model_provider
from tasks.checkpoints import require_checkpoint
from tasks.files import matching
from tasks.finetuning.accuracy import Count
from tasks.finetuning.examples import Epochs, Repeated
from tasks.finetuning.loop import set_length, train_for_epochs
from tasks.report import report_results
from tasks.retrieval.pairs import Pair, QuestionEncoder, Text, read_pairs

DEFAULTS = {"tokenizer_type": "BertWordPieceLowerCase", "model_family": "ict"}
REPORTED = (1, 5, 20, 100)
"""Numbers of passages among which the right one counts, unless --retriever-report-topk-accuracies says others."""
OF_PRETRAINING = ("data_path", "titles_data_path", "query_in_block_prob", "use_one_sent_docs")
Sets = dict[str, list[Pair]]


@dataclass(frozen=True)
class Finetuning:
    """What a run learns from and is measured on."""

    train: list[Pair]
    valid: Sets
    negatives: int = 0
    """Of each question in training."""


# --- before anything is touched -------------------------------------------------------------------


def prepare(args: Any) -> Callable[[], None]:
    """What runs the task; its files have been read."""
    refuse_unless(args.epochs is not None, f"--task {args.task} needs --epochs; 0 only evaluates")
    refuse_unless(args.epochs >= 0, f"--epochs ({args.epochs}) must not be negative")
    refuse_unless(args.valid_data, f"--task {args.task} needs --valid-data, what to evaluate on")
    for name in OF_PRETRAINING:
        flag = f"--{name.replace('_', '-')}"
        refuse_unless(
            not was_given(args, name), f"{flag} has no meaning for --task {args.task}: pretrain_ict.py reads it"
        )
    for name in ("val_av_rank_hard_neg", "val_av_rank_other_neg"):
        refuse_unless(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
    refuse_unless(
        (args.train_hard_neg > 0) if args.train_with_neg else not args.train_hard_neg,
        f"--train-with-neg takes --train-hard-neg negatives of each question, found {args.train_hard_neg}: give both",
    )
    paths = [path for word in args.valid_data for path in matching(word, "--valid-data")]
    valid = {str(path): read_pairs(path, f"--valid-data {path}") for path in paths}
    if not args.epochs:
        require_checkpoint(args)
        return partial(_evaluate, args, valid)
    refuse_unless(args.train_data, f"--task {args.task} with --epochs {args.epochs} needs --train-data")
    own = args.pretrained_checkpoint
    refuse_unless(not (own and args.bert_load), "--pretrained-checkpoint is a retriever, --bert-load a BERT: give one")
    refuse_unless(
        own is None or (hf_directory(own) is None and checkpoint_exists(own)),
        f"--pretrained-checkpoint {own} holds no checkpoint of a retriever; a BERT to start from is --bert-load",
    )
    paths = [path for word in args.train_data for path in matching(word, "--train-data")]
    train = [pair for path in paths for pair in read_pairs(path, f"--train-data {path}")]
    per_epoch = set_length(args, len(train))
    return partial(_finetune, args, Finetuning(train, valid, args.train_hard_neg), per_epoch)


# --- the run --------------------------------------------------------------------------------------


def _evaluate(args: Any, valid: Sets) -> None:
    initialize_megatron(parsed_args=args, args_defaults=DEFAULTS)
    args = get_args()
    require_same_tokenizer(args, "load")
    model = get_model(model_provider, wrap_with_ddp=False)
    state = load_run(args, model, None, None)
    measure(model, valid, state.iteration)
    close_program()


def _finetune(args: Any, task: Finetuning, per_epoch: int) -> None:
    initialize_megatron(parsed_args=args, args_defaults=DEFAULTS, for_training=True)

    def right_first(run: Run, epoch: int) -> Count:
        print_rank_0(f" > epoch {epoch} is over")
        return measure(run.model, task.valid, run.state.iteration)

    train_for_epochs(partial(_provide_data, task), model_provider, _forward_step, load_start, per_epoch, right_first)


def _provide_data(task: Finetuning, num_samples: list[int]) -> tuple[Any, Any, None]:
    args = get_args()
    encode: Any = QuestionEncoder(get_tokenizer(), args.seq_length, task.negatives)
    sizes: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.global_batch_size, "keep_last": False}
    pairs: Any = [pair for one in task.valid.values() for pair in one]
    return Epochs(task.train, encode, seed=args.seed, **sizes), Repeated(pairs, encode, num_samples[1]), None  # type: ignore[arg-type]


def _forward_step(data_iterator: Iterator[Any] | None, model: Any) -> tuple[Any, Any]:
    """Forward of one microbatch: the vectors of its questions and of all their passages, those of a question together.
    Communicates: a broadcast from the first tensor parallel rank."""
    batch = get_timed_batch(data_iterator, BATCH_KEYS)
    queries, query_mask, contexts, context_mask = (batch[name] for name in BATCH_KEYS)
    return model(queries, query_mask, contexts.flatten(0, 1), context_mask.flatten(0, 1)), loss_func


# --- measuring ------------------------------------------------------------------------------------


def measure(model: list[Any], valid: Sets, iteration: int) -> Count:
    """Report, for each set, how often a question's passage is among the first k of all passages of the set, and its
    average place; how often it is the first in all sets together. All ranks call this."""
    args, first = get_args(), 0
    for name, pairs in valid.items():
        passages = pool(pairs, args.val_av_rank_hard_neg, args.val_av_rank_other_neg)
        places = places_of_right(model, pairs, passages)
        ks = args.retriever_report_topk_accuracies or [k for k in REPORTED if k <= len(passages)]
        results = {f"top-{k} accuracy": sum(place < k for place in places) / len(places) for k in ks}
        results["average rank"] = 1 + sum(places) / len(places)
        results["passages"] = len(passages)
        report_results(f"{args.task} {Path(name).name}", results, iteration)
        first += sum(place == 0 for place in places)
    return Count(first, sum(map(len, valid.values())))


def pool(pairs: Sequence[Pair], hard: int, other: int) -> dict[Text, int]:
    """The passages of all questions, each once, and their places: of each question its own, so many of its hard and so
    many of its other negatives."""
    texts = (text for pair in pairs for text in (pair.positive, *pair.hard[:hard], *pair.other[:other]))
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}


def places_of_right(model: list[Any], pairs: Sequence[Pair], passages: dict[Text, int]) -> list[int]:
    """For each question, how many passages score higher than its own. All ranks call this."""
    encode = QuestionEncoder(get_tokenizer(), get_args().seq_length)
    with evaluating(model):
        contexts = _vectors([encode.passage(text) for text in passages], lambda *rows: model[0](None, None, *rows)[1])
        queries = _vectors([encode.question(pair.question) for pair in pairs], lambda *rows: model[0](*rows)[0])
    places = []
    for query, pair in zip(queries, pairs):
        scores = contexts @ query
        places.append(int((scores > scores[passages[pair.positive]]).sum()))
    return places


def _vectors(rows: Sequence[tuple[numpy.ndarray, numpy.ndarray]], embed: Callable[..., Tensor]) -> Tensor:
    """[rows, p] fp32 on the CPU, the same on every rank; each data parallel rank embeds a part."""
    group, batch = parallel_state.get_data_parallel_group(), get_args().micro_batch_size
    own, found = range(group.rank(), len(rows), group.size()), {}
    for begin in range(0, len(own), batch):
        part = own[begin : begin + batch]
        columns = (numpy.stack(column) for column in zip(*(rows[place] for place in part)))
        tokens, masks = (torch.from_numpy(column).to(device.current_device()) for column in columns)
        found |= dict(zip(part, embed(tokens, masks).float().cpu().numpy()))
    whole = gather_entries(found, group)
    return torch.from_numpy(numpy.stack([whole[place] for place in range(len(rows))]))
