"""Pretrain retrieval by the inverse cloze task: `torchrun --nproc-per-node N pretrain_ict.py FLAGS` (`--help` lists
them)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.ict_dataset import ICTDataset, ICTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.biencoder import BiEncoderModel
from megatron.core.models.biencoder.in_batch_loss import hits_among_top, in_batch_loss, in_batch_scores
from megatron.core.tensor_parallel.data import broadcast_data
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.retrieval.start import load_start
from megatron.training.utils import dataset_settings

BATCH_KEYS = ("query_tokens", "query_pad_mask", "context_tokens", "context_pad_mask")


def model_provider(pre_process: bool = True, post_process: bool = True) -> BiEncoderModel:
    """The two encoders that the flags describe."""
    args = get_args()
    print_rank_0("building two encoders ...")
    layer_spec = bert_layer_local_spec
    if args.spec is not None and args.spec[0] != "local":
        layer_spec = import_module(args.spec)
    return BiEncoderModel(
        core_transformer_config_from_args(args),
        2 if args.bert_binary_head else 0,
        layer_spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        args.biencoder_projection_dim,
        shared=args.biencoder_shared_query_context_model,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        true_vocab_size=get_tokenizer().vocab_size,
    )


def get_batch(data_iterator: Iterator[Any] | None) -> dict[str, Tensor]:
    """One microbatch, [b, s] each. Communicates: a broadcast from the first tensor parallel rank."""
    data = next(data_iterator) if data_iterator is not None else None
    return broadcast_data(BATCH_KEYS, data, torch.int64)


def loss_func(vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses of this rank's queries, how many there are, what to report).

    Communicates: every data parallel rank's context vectors, see `in_batch_scores`.
    """
    args, group = get_args(), parallel_state.get_data_parallel_group()
    scores = in_batch_scores(*vectors, group, scaled=args.retriever_score_scaling)
    loss, own = in_batch_loss(scores, group)
    num_queries = torch.tensor(scores.size(0), device=loss.device)
    sums = {"loss": loss.detach()}
    hits = hits_among_top(scores.detach(), own, args.retriever_report_topk_accuracies)
    sums |= {f"top{k}_acc": 100.0 * count for k, count in hits.items()}
    return loss, num_queries, {name: torch.stack([total, num_queries.float()]) for name, total in sums.items()}


def forward_step(data_iterator: Iterator[Any] | None, model: Any) -> tuple[Any, Any]:
    """Forward of one microbatch: the vectors of its queries and of their blocks."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    return model(*(batch[name] for name in BATCH_KEYS)), loss_func


def reads_data() -> bool:
    """Whether this rank needs data."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def dataset_config(sequence_length: int) -> ICTDatasetConfig:
    """How the flags cut text into blocks."""
    args = get_args()
    return ICTDatasetConfig(
        **dataset_settings(args),
        sequence_length=sequence_length,
        titles_path=args.titles_data_path,
        query_in_block_probability=args.query_in_block_prob,
        use_one_sentence_documents=args.use_one_sent_docs,
    )


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Training, validation and test data of the given sizes."""
    config = dataset_config(get_args().seq_length)
    return tuple(BlendedMegatronDatasetBuilder(ICTDataset, num_samples, reads_data, config).build())


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "BertWordPieceLowerCase", "model_family": "ict"},
        load=load_start,
    )
