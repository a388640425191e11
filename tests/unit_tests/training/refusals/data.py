"""Refusals of the rules about data and tokenizers."""

from __future__ import annotations

from megatron.training.rules import data
from tests.unit_tests.training.refusals.refusal import Refusal
from tests.unit_tests.training.settings_for_tests import REAL_DATA

REFUSALS = [
    Refusal(
        data.require_cache_for_object_storage,
        "s3://bucket/text lies in object storage; --object-storage-cache-path names",
        "--data-path s3://bucket/text",
        base=REAL_DATA,
    ),
    Refusal(data.require_validation_sets, "needs the sets: name them", "--multiple-validation-sets"),
    Refusal(
        data.require_validation_sets,
        "--dataloader-type external has none",
        "--full-validation --dataloader-type external",
    ),
    Refusal(data.require_one_data_source, "--data-path and --mock-data exclude each other", "--data-path a"),
    Refusal(
        data.require_one_data_source, "--train-data-path exclude", "--data-path a --train-data-path b", base=REAL_DATA
    ),
    Refusal(
        data.require_one_data_source, "--data-args-path exclude", "--data-path a --data-args-path b", base=REAL_DATA
    ),
    Refusal(
        data.require_one_data_source,
        "--per-split-data-args-path exclude",
        "--train-data-path a --per-split-data-args-path b",
        base=REAL_DATA,
    ),
    Refusal(
        data.refuse_split_of_separate_data, "--split 1,1,1 has no", "--train-data-path a --split 1,1,1", base=REAL_DATA
    ),
    Refusal(data.require_builder_threads, "must be positive", "--num-dataset-builder-threads 0"),
    Refusal(data.require_builder_threads, "must not be negative", "--num-workers -1"),
    Refusal(data.derive_sequence_length, "mean the same; give one of them", "--encoder-seq-length 64"),
    Refusal(data.derive_sequence_length, "must be positive", "--seq-length 0"),
    Refusal(
        data.require_positions_for_sequence,
        r"--max-position-embeddings \(128\) is smaller than --seq-length \(256\)",
        "--seq-length 256",
    ),
    Refusal(
        data.require_tokenizer_files,
        "GPT2BPETokenizer needs --vocab-file and --merge-file",
        "--tokenizer-type GPT2BPETokenizer",
    ),
    Refusal(
        data.require_tokenizer_files,
        "SentencePieceTokenizer needs --tokenizer-model",
        "--tokenizer-type SentencePieceTokenizer",
    ),
    Refusal(data.require_conversations, "--sft needs --tokenizer-type SFTTokenizer, found", "--sft"),
    Refusal(
        data.require_conversations,
        "--eod-mask-loss has no meaning with --sft",
        "--sft --tokenizer-type SFTTokenizer --tokenizer-model a --eod-mask-loss",
        base=REAL_DATA,
    ),
    Refusal(data.require_tokenizer_files, "needs --tokenizer-type SentencePiece", "--vocab-extra-ids 5"),
    Refusal(
        data.require_sequence_divides_over_ranks,
        r"--seq-length \(126\) must be divisible by 4 for --sequence-parallel",
        "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 126",
        world_size=4,
    ),
    Refusal(
        data.require_sequence_divides_over_ranks,
        "must be divisible by 8, twice --context-parallel-size",
        values={"context_parallel_size": 4, "seq_length": 12},
    ),
]
