"""The model of a finetuning task: built, run in training, and asked for its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron.core import device
from megatron.core.models.bert import BertClassifier
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.transformer.spec_utils import import_module
from megatron.inference.forward_only import (
    Batch,
    batches_in_flight,
    evaluating,
    run_batches,
    share_rows,
    shares,
    zeros,
)
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_timed_batch
from tasks.finetuning.corpora import Corpus
from tasks.finetuning.examples import NO_LABEL, Example, PairEncoder

BATCH_KEYS = ("text", "types", "padding_mask", "label")


def provide_classifier(
    corpus: Corpus, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> BertClassifier:
    """This pipeline stage (or virtual stage) of the model that the flags describe."""
    args = get_args()
    print_rank_0(f"building a classifier for {corpus.name} ...")
    layer_spec = bert_layer_local_spec
    if args.spec is not None and args.spec[0] != "local":
        layer_spec = import_module(args.spec)
    config = replace(
        core_transformer_config_from_args(args),
        variable_seq_lengths=True,  # what crosses stages has several rows for a sample with several choices
        calculate_per_token_loss=True,  # the mean over all samples of a step, where some places are empty too
    )
    return BertClassifier(
        config,
        2 if args.bert_binary_head else 0,
        layer_spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        corpus.num_classes,
        corpus.num_choices,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        true_vocab_size=get_tokenizer().vocab_size,
    )


def model_provider_of(corpus: Corpus) -> Callable[..., nn.Module]:
    """A model provider as `pretrain` takes it."""
    return partial(provide_classifier, corpus)


def encoder_of(corpus: Corpus) -> PairEncoder:
    """How the corpus' texts become tokens in this run."""
    return PairEncoder(get_tokenizer(), get_args().seq_length, corpus.most_first)


def run_classifier(model: nn.Module, batch: Batch) -> Tensor:
    """Scores [b, classes] (the activations, before the last stage)."""
    types = batch["types"] if get_args().bert_binary_head else None
    return model(batch["text"], batch["padding_mask"], types)


def forward_step(data_iterator: Iterator[Any] | None, model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """Forward of one microbatch. Communicates: a broadcast from the first tensor parallel rank."""
    batch = get_timed_batch(data_iterator, BATCH_KEYS)
    return run_classifier(model, batch), partial(loss_func, batch["label"])


def loss_func(labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses of the samples, how many there are, what to report)."""
    loss = cross_entropy(scores.float(), labels, ignore_index=NO_LABEL, reduction="sum")
    num_samples = (labels != NO_LABEL).sum()
    return loss, num_samples, {"lm loss": torch.stack([loss.detach(), num_samples.float()])}


def probabilities(
    model: list[nn.Module], examples: Sequence[Example], encode: PairEncoder, *, num_classes: int, batch_size: int
) -> Tensor:
    """[examples, classes] fp64: how likely each class is, the same on every rank. All ranks call this.

    Args:
        batch_size: examples that a data parallel rank runs at once.
    """
    totals = zeros(len(examples) + 1, num_classes)  # the last row is for empty places
    with evaluating(model):
        for share in shares(len(examples), batch_size, batches_in_flight()):
            batches = [_collate(rows, share.begin, examples, encode) for rows in share.batches]
            for rows, values in run_batches(
                model,
                batches,
                run_classifier,
                lambda scores, batch: (batch["rows"], scores.double().softmax(-1)),
                seq_length=encode.length,
                num_sequences=batches[0]["text"].flatten(0, -2).size(0),
            ):
                totals[rows] = values
    return share_rows(totals)[:-1].cpu()


def _collate(
    rows: Sequence[int | None], filler: int, examples: Sequence[Example], encode: PairEncoder
) -> dict[str, Tensor]:
    """A batch on this rank's device; an empty place is taken by example `filler`, under a number behind the last's."""
    encoded = [encode(examples[filler if row is None else row]) for row in rows]
    batch = {name: torch.stack([one[name] for one in encoded]) for name in BATCH_KEYS}
    batch["rows"] = torch.tensor([len(examples) if row is None else row for row in rows])
    return {name: tensor.to(device.current_device()) for name, tensor in batch.items()}
