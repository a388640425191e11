"""What the programs of some model families cannot do, however right it is for others."""

from __future__ import annotations

import argparse

from megatron.training.capabilities import program_of
from megatron.training.settings import refuse_unless

ENCODER_FAMILIES = ("bert", "t5", "ict", "retrieval")
RETRIEVAL_FAMILIES = ("ict", "retrieval")

_NOT_FOR_ENCODERS = (
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    "mock_data",
    "calculate_per_token_loss",
    "defer_embedding_wgrad_compute",
    "qk_layernorm",
    "qk_l2_norm",
    "multi_latent_attention",
    "mtp_num_layers",
    "use_rope_scaling",
)

_POSITIONS = {
    "bert": ("learned_absolute", "rope"),
    "t5": ("learned_absolute", "rope", "relative"),
    "ict": ("learned_absolute", "rope"),
    "retrieval": ("learned_absolute", "rope"),
}

_SHORTEST_SAMPLE = {"bert": 5, "t5": 3}
"""[CLS] a [SEP] b [SEP]; a word and what T5 leaves room for."""

_NOT_FOR_TWO_STACKS = (
    "spec",
    "group_query_attention",
    "use_torch_fsdp2",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

_SCHEDULES_OF_TWO_STACKS = ("auto", "1f1b", "gpipe", "zb-h1")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def require_what_an_encoder_can_do(args: argparse.Namespace) -> None:
    """A masked language model reads sentences, has each sequence on one rank, and takes the mean loss itself."""
    if args.model_family not in ENCODER_FAMILIES:
        return
    program = program_of(args.model_family)
    refuse_unless(
        args.context_parallel_size == 1,
        f"--context-parallel-size {args.context_parallel_size}: {program} does not split sequences; use "
        "--tensor-model-parallel-size with --sequence-parallel for long ones",
    )
    for name in _NOT_FOR_ENCODERS:
        refuse_unless(not getattr(args, name), f"{_flag(name)} has no meaning for {program}")


def require_positions_of_family(args: argparse.Namespace) -> None:
    """Encoders have fewer kinds of positions than decoders, and only T5 has relative ones."""
    kind, known = args.position_embedding_type, _POSITIONS.get(args.model_family)
    if known is not None:
        refuse_unless(
            kind in known,
            f"--position-embedding-type {kind}: {program_of(args.model_family)} has {', '.join(known)}",
        )
    else:
        refuse_unless(kind != "relative", "--position-embedding-type relative: only pretrain_t5.py reads it")


OWN_SENTINELS = ("HuggingFaceTokenizer", "NullTokenizer")
"""Tokenizers that may have sentinels of their own, and the one of models that see no text; data without them are
refused."""


def derive_two_stacks(args: argparse.Namespace) -> None:
    """A T5 has an encoder and a decoder, by default as deep as each other; some settings know one stack only."""
    if args.model_family != "t5":
        return
    if args.decoder_num_layers is None:
        args.decoder_num_layers = args.num_layers or args.encoder_num_layers
    refuse_unless(
        args.decoder_seq_length, "pretrain_t5.py needs --decoder-seq-length, the tokens that the decoder takes"
    )
    refuse_unless(
        args.vocab_extra_ids > 0 or args.tokenizer_type in OWN_SENTINELS,
        "pretrain_t5.py needs --vocab-extra-ids (100, say): a sentinel for each run",
    )
    for name in _NOT_FOR_TWO_STACKS:
        refuse_unless(
            not getattr(args, name),
            f"{_flag(name)}: pretrain_t5.py has two stacks of layers, for which it is not built",
        )
    refuse_unless(
        args.pipeline_schedule in _SCHEDULES_OF_TWO_STACKS,
        f"--pipeline-schedule {args.pipeline_schedule}: pretrain_t5.py has one model chunk on each rank, since an "
        f"encoder and its decoder follow each other; use {', '.join(_SCHEDULES_OF_TWO_STACKS)}",
    )


def derive_encoder_stages(args: argparse.Namespace) -> None:
    """Stages of the encoder come before those of the decoder, which `--pipeline-model-parallel-size` counts.

    `--pipeline-model-parallel-split-rank` is the older way: there the latter counts both.
    """
    if args.model_family != "t5":
        return
    split, stages = args.pipeline_model_parallel_split_rank, args.pipeline_model_parallel_size
    if split is not None:
        refuse_unless(
            not args.encoder_pipeline_model_parallel_size,
            "--pipeline-model-parallel-split-rank and --encoder-pipeline-model-parallel-size say the same; give one",
        )
        refuse_unless(
            0 < split < stages,
            f"--pipeline-model-parallel-split-rank ({split}) must leave both stacks some of the "
            f"--pipeline-model-parallel-size {stages} stages",
        )
        args.encoder_pipeline_model_parallel_size = split
        args.pipeline_model_parallel_size = stages - split
    encoder, tensor = args.encoder_pipeline_model_parallel_size, args.encoder_tensor_model_parallel_size
    refuse_unless(
        encoder > 0 or stages == 1,
        f"--pipeline-model-parallel-size {stages} counts the stages of the decoder: pretrain_t5.py needs "
        "--encoder-pipeline-model-parallel-size too, those of the encoder",
    )
    args.pipeline_model_parallel_split_rank = encoder or None
    refuse_unless(
        tensor in (0, args.tensor_model_parallel_size),
        f"--encoder-tensor-model-parallel-size ({tensor}) must be --tensor-model-parallel-size "
        f"({args.tensor_model_parallel_size}): both stacks share the embedding",
    )


def derive_two_encoders(args: argparse.Namespace) -> None:
    """Retrieval has an encoder for queries and one for passages, whose vectors are equally wide."""
    if args.model_family not in RETRIEVAL_FAMILIES:
        return
    head, projection = args.ict_head_size, args.biencoder_projection_dim
    refuse_unless(
        not (head and projection) or head == projection,
        f"--ict-head-size ({head}) and --biencoder-projection-dim ({projection}) are two names of one width; give one",
    )
    args.biencoder_projection_dim = projection or head or 0
    refuse_unless(
        args.pipeline_model_parallel_size == 1,
        f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: a pipeline carries what one "
        "encoder computes, retrieval has two; use --tensor-model-parallel-size",
    )
    refuse_unless(not args.use_torch_fsdp2, "--use-torch-fsdp2: retrieval with two encoders is not built for it")
    refuse_unless(
        0 <= args.query_in_block_prob <= 1, f"--query-in-block-prob ({args.query_in_block_prob}) must be 0 to 1"
    )
    refuse_unless(0 < args.sample_rate <= 1, f"--sample-rate ({args.sample_rate}) must be above 0 and at most 1")
    for name in ("indexer_batch_size", "indexer_log_interval", "retriever_seq_length"):
        refuse_unless(getattr(args, name) > 0, f"{_flag(name)} ({getattr(args, name)}) must be positive")
    ks = args.retriever_report_topk_accuracies
    refuse_unless(all(k > 0 for k in ks), f"--retriever-report-topk-accuracies {ks}: each k must be positive")


def require_masked_samples(args: argparse.Namespace) -> None:
    """Shares are shares, and a sample has room for words between its special tokens."""
    if args.model_family not in ENCODER_FAMILIES:
        return
    for name in ("mask_prob", "short_seq_prob"):
        refuse_unless(0 <= getattr(args, name) <= 1, f"{_flag(name)} ({getattr(args, name)}) must be between 0 and 1")
    fewest = _SHORTEST_SAMPLE.get(args.model_family, 1)
    length = args.seq_length if args.encoder_seq_length is None else args.encoder_seq_length
    refuse_unless(
        length is None or length >= fewest,
        f"--seq-length ({length}) must be at least {fewest} for pretrain_{args.model_family}.py: a sample has special "
        "tokens beside its words",
    )


def require_buckets_of_distances(args: argparse.Namespace) -> None:
    """Half of the buckets are for near distances, one each; an encoder parts them among both directions first."""
    if args.position_embedding_type != "relative":
        return
    buckets, longest = args.relative_attention_num_buckets, args.relative_attention_max_distance
    refuse_unless(
        buckets >= 4 and longest > buckets // 2,
        f"--relative-attention-num-buckets ({buckets}) must be at least 4, and --relative-attention-max-distance "
        f"({longest}) larger than half of it",
    )


FAMILY_RULES = (
    require_what_an_encoder_can_do,
    require_masked_samples,
    require_positions_of_family,
    require_buckets_of_distances,
    derive_two_stacks,
    derive_encoder_stages,
    derive_two_encoders,
)
