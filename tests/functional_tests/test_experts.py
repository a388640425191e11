"""Mixtures of experts through the program: every layout, kind of experts and dispatcher gives one process's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.config.flags import in_terms_of_flags
from megatron.training.settings import ConfigurationError, Source
from tests.functional_tests.program import TINY, pretrain_gpt, train_rows

MODEL = """--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0 --moe-aux-loss-coeff 0.05 --moe-z-loss-coeff 0.01 --train-iters 4 --seed 3
    --use-distributed-optimizer"""
LAYOUTS = {
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall": 2,
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    " --moe-token-dispatcher-type alltoall --moe-grouped-gemm": 2,
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --moe-layer-recompute": 4,
    "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --expert-model-parallel-size 2"
    " --moe-token-dispatcher-type allgather --moe-grouped-gemm": 4,
}


REFUSED = {
    "--num-experts 6 --expert-model-parallel-size 4": "--num-experts (6) must be divisible by "
    "--expert-model-parallel-size (4); the nearest that is: 4 or 8",
    "--moe-router-topk 5": "--moe-router-topk (5) must be at least 1 and at most --num-experts (4)",
    "--moe-router-topk 1": "--moe-router-topk (1) with softmax scores needs --moe-router-pre-softmax",
    "--moe-router-num-groups 3 --moe-router-group-topk 1": "--num-experts (4) must be divisible by",
    "--moe-router-num-groups 2 --moe-router-group-topk 3": "must not exceed --moe-router-num-groups (2)",
    "--moe-router-group-topk 1": "needs --moe-router-num-groups",
    "--moe-token-dispatcher-type flex --moe-expert-capacity-factor 1": "use alltoall",
    "--moe-pad-expert-input-to-capacity": "needs --moe-expert-capacity-factor",
    "--moe-router-load-balancing-type sinkhorn --moe-expert-capacity-factor 1": "it can be 'aux_loss', 'seq_aux",
    "--moe-router-load-balancing-type aux_loss seq_aux_loss": "must have one value for each of the 2",
    "--moe-shared-expert-overlap": "--moe-shared-expert-overlap needs",
    "--moe-router-enable-expert-bias": "needs --moe-router-score-function 'sigmoid'",
}


@pytest.mark.parametrize("flags", list(REFUSED))
def test_what_does_not_fit_is_refused_before_anything_starts(flags: str) -> None:
    argv = [*TINY, *MODEL.split(), *flags.split()]
    args = parse_args(argv=argv)
    args.put("world_size", args.expert_model_parallel_size, Source("flag", "--nproc"))
    with pytest.raises((ConfigurationError, ValueError)) as refused:
        core_transformer_config_from_args(validate_args(args))
    assert REFUSED[flags] in in_terms_of_flags(str(refused.value)), refused.value


def rows(path: Path) -> list[tuple[float, ...]]:
    return [
        tuple(row[n] for n in ("lm loss", "load_balancing_loss", "z_loss", "grad-norm")) for row in train_rows(path)
    ]


def assert_same(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_layouts_and_checkpoints_of_experts(tmp_path: Path) -> None:
    """Each layout computes what one process does, and goes on where another one stopped, optimizer included."""
    alone = tmp_path / "alone.jsonl"
    pretrain_gpt(1, f"{MODEL} --metrics-jsonl {alone}")
    expected = rows(alone)
    saved = tmp_path / "checkpoints"
    for i, (layout, ranks) in enumerate(LAYOUTS.items()):
        path = tmp_path / f"{i}.jsonl"
        if i == 0:
            save = f"--save {saved} --save-interval 2 --exit-interval 2"
            pretrain_gpt(ranks, f"{MODEL} {layout} --metrics-jsonl {path} {save}")
            assert_same(rows(path), expected[:2])
        else:
            pretrain_gpt(ranks, f"{MODEL} {layout} --metrics-jsonl {path} --load {saved}")
            assert_same(rows(path), expected[2:])


SHARDED, PLAIN = MODEL, MODEL.replace("--use-distributed-optimizer", "")
SPREAD = next(iter(LAYOUTS))


@pytest.mark.parametrize(
    "writer, reader, types",
    [
        (f"{SHARDED} {SPREAD}", PLAIN, ""),
        (f"{PLAIN}", f"{SHARDED} {SPREAD} --moe-grouped-gemm", ""),
        pytest.param(  # the first stage has no experts
            f"{SHARDED} --moe-layer-freq ([0,0,1,1])",
            f"{SHARDED} {SPREAD} --moe-layer-freq ([0,0,1,1]) --pipeline-model-parallel-size 2",
            "",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"{SHARDED} {SPREAD}", SHARDED, "--bf16", marks=pytest.mark.slow),
        pytest.param(PLAIN, f"{PLAIN} {SPREAD}", "--bf16", marks=pytest.mark.slow),
        pytest.param(f"{PLAIN} {SPREAD}", f"{SHARDED} {SPREAD}", "--bf16", marks=pytest.mark.slow),
    ],
)
def test_one_optimizer_goes_on_from_two_and_back(tmp_path: Path, writer: str, reader: str, types: str) -> None:
    """Experts that have replicas of their own have an optimizer of their own."""
    whole, saved, rest = tmp_path / "whole.jsonl", tmp_path / "checkpoints", tmp_path / "rest.jsonl"
    ranks_of = {flags: (2 if SPREAD in flags else 1) * (2 if "pipeline" in flags else 1) for flags in (writer, reader)}
    pretrain_gpt(
        ranks_of[writer],
        f"{writer} {types} --metrics-jsonl {whole} --save {saved} --save-interval 2 --ckpt-format torch_dist",
    )
    pretrain_gpt(ranks_of[reader], f"{reader} {types} --metrics-jsonl {rest} --load {saved} --ckpt-step 2")
    if types:
        assert [row[0] for row in rows(rest)] == pytest.approx([row[0] for row in rows(whole)[2:]], rel=2e-3)
    else:
        assert_same(rows(rest), rows(whole)[2:])
