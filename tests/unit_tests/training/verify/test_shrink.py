"""The small copy of a command line: the same layout, kinds and ratios; one process that computes the same."""

from __future__ import annotations

import pytest
import torch

from megatron.training.arguments import parse_args, validate_args
from megatron.training.settings import ConfigurationError, Settings
from megatron.training.verify.shrink import Shrunk, shrink

LARGE = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 4 --global-batch-size 256 --train-iters 100000 --lr 3e-4 --min-lr 3e-5 "
    "--lr-warmup-fraction 0.01 --data-path corpus --tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m "
    "--save out --load out --save-interval 500 --tensorboard-dir tb --attention-dropout 0.1 "
)


def small(flags: str, ranks: int | None = None) -> Shrunk:
    return shrink((LARGE + flags).split(), ranks, steps=5)


def settings(words: list[str], ranks: int) -> Settings:
    """The settings that a program would run with: refused flags would raise."""
    args = parse_args(argv=words)
    args.world_size = ranks
    validate_args(args, for_training=True)
    return args


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", None),
        ("--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4", 64),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5", None),
        ("--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split --num-layers 31", None),
        ("--context-parallel-size 4 --cp-comm-type a2a --group-query-attention --num-query-groups 8", None),
        ("--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2", 8),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16", 4),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 4", 2),
        ("--rampup-batch-size 32 32 100000 --train-samples 1000000 --train-iters 1 --lr-decay-style cosine", 2),
        ("--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope", 2),
        ("--window-size 1023 0 --kv-channels 64 --calculate-per-token-loss --reset-attention-mask", 2),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 1000 --untie-embeddings-and-output-weights", 2),
    ],
)
def test_both_command_lines_are_accepted(flags: str, ranks: int | None) -> None:
    if "--train-samples" in flags:
        flags = flags.replace("--train-iters 1 ", "")
        command = shrink((LARGE.replace("--train-iters 100000", "") + flags).split(), ranks, 5)
    else:
        command = small(flags, ranks)
    args, one = settings(command.words, command.ranks), settings(command.reference, 1)
    assert args.num_layers <= 8
    assert args.hidden_size <= 256
    assert args.attention_dropout == args.hidden_dropout == 0.0
    assert args.mock_data and args.save is args.load is args.tensorboard_dir is None
    assert not (args.bf16 or args.fp16)
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "seq_length", "vocab_size",
                 "global_batch_size", "optimizer", "lr_decay_style", "swiglu", "window_size"):  # fmt: skip
        assert getattr(args, name) == getattr(one, name), name
    assert one.tensor_model_parallel_size == one.pipeline_model_parallel_size == one.context_parallel_size == 1


def test_ratios_stay() -> None:
    flags = "--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 8 --ffn-hidden-size 14336"
    args = settings(small(flags).words, 2)
    assert args.num_attention_heads // args.num_query_groups == 4
    assert args.ffn_hidden_size / args.hidden_size == pytest.approx(14336 / 4096, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "groups", "small_groups"),
    [("--context-parallel-size 2", 8, 2), ("--context-parallel-size 4", 2, 2), ("--context-parallel-size 2", 1, 1)],
)
def test_ranks_share_groups_of_keys_only_if_they_did(ranks: str, groups: int, small_groups: int) -> None:
    command = small(f"{ranks} --cp-comm-type a2a --group-query-attention --num-query-groups {groups}")
    args = settings(command.words, command.ranks)
    assert args.num_query_groups == small_groups
    assert args.num_attention_heads // args.num_query_groups == 32 // groups


def test_changes_are_said_with_the_values_given() -> None:
    changes = small("--tensor-model-parallel-size 2 --vocab-size 50257").changes
    assert "--hidden-size 4096 -> 32" in changes
    assert "--vocab-size 123, random tokens" in changes


def test_longer_stages_stay_longer() -> None:
    args = settings(
        small(
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 12 "
            "--decoder-last-pipeline-num-layers 4"
        ).words,
        4,
    )
    assert args.decoder_first_pipeline_num_layers == 2
    assert args.decoder_last_pipeline_num_layers == 1
    assert args.num_layers == 5


def test_reference_takes_one_sample_at_a_time_unless_the_grouping_counts() -> None:
    size = lambda flags: settings(small(f"--tensor-model-parallel-size 2 {flags}").reference, 1).micro_batch_size  # noqa: E731
    assert size("") == 1
    assert size("--eod-mask-loss") == 2
    assert size("--eod-mask-loss --calculate-per-token-loss") == 1


def test_ranks() -> None:
    assert small("--tensor-model-parallel-size 2 --context-parallel-size 2").ranks == 4
    assert small("--tensor-model-parallel-size 2", ranks=8).ranks == 8
    assert small("--tensor-model-parallel-size 2 --bf16").half_precision is torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ("", None, "there is no layout to verify"),
        ("--tensor-model-parallel-size 2", 3, "do not divide by"),
        ("--data-parallel-random-init", 2, "no one process computes the same"),
        ("--use-legacy-models --tensor-model-parallel-size 2", None, "not built yet"),
        ("--spec my.module spec --tensor-model-parallel-size 2", None, "a program of your own"),
    ],
)
def test_refusals(flags: str, ranks: int | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small(flags, ranks)


def test_programs_of_other_families() -> None:
    bert = {"model_family": "bert", "tokenizer_type": "BertWordPieceLowerCase"}
    command = shrink((LARGE + "--tensor-model-parallel-size 2 --mask-prob 0.2").split(), 2, 3, bert)
    assert "--mock-data" not in command.words and "--mask-prob" in command.words
    assert "NullTokenizer" in command.words
    with pytest.raises(ConfigurationError, match="two stacks"):
        shrink(LARGE.split(), 2, 3, {"model_family": "t5"})
