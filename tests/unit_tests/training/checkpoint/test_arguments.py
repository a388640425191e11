"""Settings that are taken from a checkpoint, and the check that a run continues its own model."""

from __future__ import annotations

import argparse

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpoint.arguments import apply_checkpoint_args, require_same_model
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import parsed, validated


def test_checkpoint_completes_and_overrides() -> None:
    saved = validated(
        "--swiglu --position-embedding-type rope --hidden-dropout 0.3 --untie-embeddings-and-output-weights"
    )
    saved.padded_vocab_size = 256
    flags = "--load run --use-checkpoint-args --hidden-dropout 0.5 --seq-length 64 --mock-data --vocab-size 100"
    args = parse_args(argv=flags.split())
    apply_checkpoint_args(args, saved.plain())
    assert (args.num_layers, args.hidden_size, args.padded_vocab_size) == (4, 64, 256)
    assert args.seq_length == 64  # this run has a value of its own
    assert (args.hidden_dropout, args.swiglu, args.position_embedding_type) == (0.3, True, "rope")
    assert str(args.source("num_layers")) == "checkpoint run"
    args.micro_batch_size = 1
    validate_args(args)


def test_format_is_taken_unless_given() -> None:
    args = parsed()
    apply_checkpoint_args(args, {"ckpt_format": "torch"})
    assert args.ckpt_format == "torch"
    args = parsed("--ckpt-format torch_dist")
    apply_checkpoint_args(args, {"ckpt_format": "torch"})
    assert args.ckpt_format == "torch_dist"


def test_what_a_decoder_takes_is_taken_unless_given() -> None:
    for flags, expected in (("", 64), ("--decoder-seq-length 32", 32)):
        args = parsed(flags)
        apply_checkpoint_args(args, {"decoder_seq_length": 64})
        assert args.decoder_seq_length == expected


def test_layout_is_taken_only_where_asked_for() -> None:
    saved = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}
    args = parsed()
    apply_checkpoint_args(args, saved)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (1, 1)
    args = parsed("--use-mp-args-from-checkpoint-args")
    apply_checkpoint_args(args, saved)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 4)


def test_tokenizer_file_can_be_kept() -> None:
    args = parsed("--tokenizer-model here")
    apply_checkpoint_args(args, {"tokenizer_model": "there"})
    assert args.tokenizer_model == "there"
    args = parsed("--tokenizer-model here --no-use-tokenizer-model-from-checkpoint-args")
    apply_checkpoint_args(args, {"tokenizer_model": "there"})
    assert args.tokenizer_model == "here"


def test_plain_namespaces_work() -> None:
    args = argparse.Namespace(num_layers=None, swiglu=False, load="x")
    apply_checkpoint_args(args, argparse.Namespace(num_layers=3, swiglu=True))
    assert (args.num_layers, args.swiglu) == (3, True)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--use-checkpoint-args", "--use-checkpoint-args needs --load"),
        (
            "--use-checkpoint-args --load x --non-persistent-ckpt-type local",
            "does not work with --non-persistent-ckpt-type local",
        ),
    ],
)
def test_checkpoint_must_be_known_before_arguments_are_taken(flags: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(flags)


def test_another_model_is_refused_with_all_differences() -> None:
    args = validated()
    saved = dict(vars(args), num_layers=8, hidden_size=32)
    with pytest.raises(ConfigurationError) as refusal:
        require_same_model(args, saved)
    assert "num_layers is 4 here and 8 in the checkpoint" in str(refusal.value)
    assert "hidden_size is 64 here and 32 in the checkpoint" in str(refusal.value)
    require_same_model(args, args.plain())


def test_layout_matters_for_whole_files_only() -> None:
    args = validated()
    saved = dict(vars(args), tensor_model_parallel_size=2)
    require_same_model(args, saved)
    with pytest.raises(ConfigurationError, match="tensor_model_parallel_size"):
        require_same_model(args.variant(ckpt_format="torch"), saved)
