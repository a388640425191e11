"""Rules about data sources, sequence lengths and tokenizers."""

from __future__ import annotations

import argparse
import math

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training.settings import refuse_unless, warn, was_given

SPLIT_PATHS = ("train_data_path", "valid_data_path", "test_data_path")
TOKENIZER_NEEDS: dict[str, tuple[str, ...]] = {
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model", "tiktoken_pattern"),
    "SFTTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
    "NullMultimodalTokenizer": ("vocab_size",),
    "MultimodalTokenizer": ("tokenizer_model", "tokenizer_prompt_format"),  # the latter is of programs with pictures
}
TOKENIZERS_WITH_SENTINELS = ("SentencePieceTokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")


def require_one_data_source(args: argparse.Namespace) -> None:
    """Data comes from one place: a shared blend, a blend per split, or nowhere (mock)."""
    shared = _given(args, "data_path", "data_args_path")
    per_split = _given(args, *SPLIT_PATHS, "per_split_data_args_path")
    kinds = [kind for kind in (shared, per_split, _given(args, "mock_data")) if kind]
    refuse_unless(len(kinds) <= 1, f"{' and '.join(sum(kinds, []))} exclude each other; name one source of data")
    refuse_unless(
        not (args.data_path and args.data_args_path),
        "--data-path and --data-args-path exclude each other; the latter is a file with the words of the former",
    )
    refuse_unless(
        not (args.per_split_data_args_path and len(per_split) > 1),
        f"{' and '.join(per_split)} exclude each other; the last is a file with the words of the others",
    )


def derive_split(args: argparse.Namespace) -> None:
    """Shared data is mostly for training."""
    shared = args.data_path is not None or args.data_args_path is not None
    if shared and args.split is None:
        args.split = "969, 30, 1"
        warn(args, f"--split is not given; data is split into {args.split} (training, validation, test)")


def refuse_split_of_separate_data(args: argparse.Namespace) -> None:
    """Data that is given for each split is not split again."""
    per_split = _given(args, *SPLIT_PATHS, "per_split_data_args_path")
    refuse_unless(
        not per_split or args.split is None,
        f"--split {args.split} has no meaning with {' and '.join(per_split)}; leave one of them out",
    )


def require_cache_for_object_storage(args: argparse.Namespace) -> None:
    """The indices of data in object storage are kept in a local folder."""
    paths = [word.strip() for name in ("data_path", *SPLIT_PATHS) for word in getattr(args, name) or ()]
    remote = [path for path in paths if is_object_storage_path(path)]
    refuse_unless(
        not remote or args.object_storage_cache_path is not None,
        f"{remote[0] if remote else ''} lies in object storage; --object-storage-cache-path names a local folder for "
        "the indices of such data",
    )


def switch_multi_storage_client(args: argparse.Namespace) -> None:
    """Paths msc:// are read unless that is turned off."""
    if args.enable_msc:
        MultiStorageClientFeature.enable()
        return
    MultiStorageClientFeature.disable()
    warn(args, "--disable-msc: the multi-storage client is turned off, paths msc:// cannot be read")


def require_validation_sets(args: argparse.Namespace) -> None:
    """Several validation sets are named as such; a full pass needs data that has an end."""
    refuse_unless(
        not args.multiple_validation_sets or bool(args.valid_data_path or args.per_split_data_args_path),
        "--multiple-validation-sets needs the sets: name them with --valid-data-path (or in the file of "
        "--per-split-data-args-path), without weights",
    )
    refuse_unless(
        not args.full_validation or args.dataloader_type != "external",
        "--full-validation reads a data set to its end; --dataloader-type external has none that is known",
    )


def derive_dataloader_type(args: argparse.Namespace) -> None:
    """Samples come once, in the order of the data set."""
    if args.dataloader_type is None:
        args.dataloader_type = "single"


def require_builder_threads(args: argparse.Namespace) -> None:
    """Somebody has to build the indices."""
    threads = args.num_dataset_builder_threads
    refuse_unless(threads > 0, f"--num-dataset-builder-threads ({threads}) must be positive")
    refuse_unless(args.num_workers >= 0, f"--num-workers ({args.num_workers}) must not be negative")


def derive_sequence_length(args: argparse.Namespace) -> None:
    """`--seq-length` and `--encoder-seq-length` are two names of one thing."""
    copy_alias(args, "seq_length", "encoder_seq_length")
    if args.seq_length is not None:
        refuse_unless(args.seq_length > 0, f"--seq-length ({args.seq_length}) must be positive")


def require_positions_for_sequence(args: argparse.Namespace) -> None:
    """Every token of a sample has a position; YaRN stretches those that latent attention rotates by."""
    stretch = args.rotary_scaling_factor if args.multi_latent_attention else 1
    for name in ("seq_length", "decoder_seq_length"):
        length, positions = getattr(args, name), args.max_position_embeddings
        if length is not None and positions is not None:
            refuse_unless(
                positions * stretch >= length,
                f"--max-position-embeddings ({positions}) is smaller than {_flag(name)} ({length}); raise "
                "the former or shorten the latter",
            )


def require_sequence_divides_over_ranks(args: argparse.Namespace) -> None:
    """Context parallel ranks take an early and a late piece each; tensor parallel ranks take equal ones."""
    if args.seq_length is None:
        return
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    if cp > 1:
        refuse_unless(
            args.seq_length % (2 * cp) == 0,
            f"--seq-length ({args.seq_length}) must be divisible by {2 * cp}, twice --context-parallel-size; "
            f"{nearest_multiples(args.seq_length, 2 * cp)}",
        )
    if args.sequence_parallel and args.decoder_seq_length is not None:
        refuse_unless(
            args.decoder_seq_length % tp == 0,
            f"--decoder-seq-length ({args.decoder_seq_length}) must be divisible by --tensor-model-parallel-size {tp} "
            f"for --sequence-parallel; {nearest_multiples(args.decoder_seq_length, tp)}",
        )
    if args.sequence_parallel:
        refuse_unless(
            args.seq_length % (cp * tp) == 0,
            f"--seq-length ({args.seq_length}) must be divisible by {cp * tp} for --sequence-parallel with "
            f"--tensor-model-parallel-size {tp}{f' and --context-parallel-size {cp}' if cp > 1 else ''}; "
            f"{nearest_multiples(args.seq_length, math.lcm(cp * tp, 2 * cp if cp > 1 else 1))}",
        )


def nearest_multiples(value: int, divisor: int) -> str:
    """What would do instead of a value that is no multiple, for a message."""
    below = value // divisor * divisor
    return f"the nearest that is: {' or '.join(str(n) for n in (below, below + divisor) if n > 0)}"


def require_tokenizer_files(args: argparse.Namespace) -> None:
    """Each tokenizer reads its own files."""
    missing = [name for name in TOKENIZER_NEEDS.get(args.tokenizer_type, ()) if getattr(args, name, None) is None]
    chosen = "" if was_given(args, "tokenizer_type") else " (the default of this program)"
    refuse_unless(
        not missing,
        f"--tokenizer-type {args.tokenizer_type}{chosen} needs {' and '.join(map(_flag, missing))}",
    )
    if args.vocab_extra_ids:
        refuse_unless(
            args.tokenizer_type in TOKENIZERS_WITH_SENTINELS,
            f"--vocab-extra-ids ({args.vocab_extra_ids}) needs --tokenizer-type "
            f"{' or '.join(TOKENIZERS_WITH_SENTINELS)}, found {args.tokenizer_type}",
        )
    if args.tokenizer_type == "TikTokenizer":
        refuse_unless(
            args.tiktoken_pattern in ("v1", "v2"),
            f"--tiktoken-pattern ({args.tiktoken_pattern}) can be v1 or v2",
        )


def require_conversations(args: argparse.Namespace) -> None:
    """Fine-tuning on conversations: a tokenizer that can write them down, and samples of one document each."""
    if not args.sft:
        return
    refuse_unless(
        args.tokenizer_type == "SFTTokenizer",
        f"--sft needs --tokenizer-type SFTTokenizer, found {args.tokenizer_type}",
    )
    for name in ("mock_data", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        refuse_unless(not getattr(args, name), f"{_flag(name)} has no meaning with --sft; leave one of them out")


def copy_alias(args: argparse.Namespace, name: str, alias: str) -> None:
    """Two arguments that mean the same: at most one is given, and both have its value afterwards."""
    value, other = getattr(args, name), getattr(args, alias)
    refuse_unless(
        value is None or other is None or value == other,
        f"{_flag(name)} ({value}) and {_flag(alias)} ({other}) mean the same; give one of them",
    )
    if value is None:
        setattr(args, name, other)
    elif other is None:
        setattr(args, alias, value)


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """The flags among these that are set."""
    return [_flag(name) for name in names if getattr(args, name)]


def _flag(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


DATA_RULES = (
    require_one_data_source,
    derive_split,
    refuse_split_of_separate_data,
    require_cache_for_object_storage,
    switch_multi_storage_client,
    derive_dataloader_type,
    require_validation_sets,
    require_builder_threads,
    derive_sequence_length,
    require_positions_for_sequence,
    require_sequence_divides_over_ranks,
    require_tokenizer_files,
    require_conversations,
)
