"""What is not built is refused when set; what does nothing is accepted with a warning."""

from __future__ import annotations

import enum
import logging
from typing import Any

import pytest

from megatron.training import capabilities
from megatron.training.capabilities import (
    VALUES_NOT_BUILT,
    capabilities_not_built,
    refuse_capabilities_not_built,
)
from megatron.training.config.flags import Flag, all_flags
from megatron.training.rules.replaced import REPLACEMENTS, is_without_effect
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import parsed, validated

NOT_BUILT = sorted(capabilities_not_built())
REPLACED = (*REPLACEMENTS, "checkpoint_activations")
WITHOUT_EFFECT = [flag for flag in all_flags().values() if is_without_effect(flag) and flag.dest not in REPLACED]


def words_for(flag: Flag) -> list[str]:
    """A use of `flag` that departs from its default."""
    if flag.switch:
        return [flag.names[0]]
    return [flag.names[0], str(other_value(flag))]


def other_value(flag: Flag) -> Any:
    if flag.dest in VALUES_NOT_BUILT:
        used = VALUES_NOT_BUILT[flag.dest][0]
        return next(choice for choice in flag.choices if used(choice))
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    assert not isinstance(flag.default, enum.Enum)
    if flag.type is str:
        return "other"
    return (flag.default or 1) + 1 if not isinstance(flag.default, list) else 7


@pytest.mark.parametrize("dest", NOT_BUILT)
def test_flag_of_unbuilt_capability_is_refused(dest: str) -> None:
    flag = all_flags()[dest]
    with pytest.raises(ConfigurationError, match=f"{flag.names[0]}.*: not built yet"):
        refuse_capabilities_not_built(parsed(" ".join(words_for(flag))))


def test_defaults_are_not_refused() -> None:
    refuse_capabilities_not_built(parsed())


def test_unbuilt_value_equal_to_its_default_is_accepted() -> None:
    validated("--expert-model-parallel-size 1 --context-parallel-size 1 --moe-router-topk 2")


def test_all_unbuilt_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        validated("--use-legacy-models --use-nccl-ub --cross-entropy-fusion-impl te")
    for word in ("--use-legacy-models", "--use-nccl-ub", "--cross-entropy-fusion-impl te"):
        assert f"  {word}: not built yet" in str(refusal.value)


def test_transformer_engine_is_refused_only_where_asked_for() -> None:
    assert validated().transformer_impl == "local"
    assert validated("--transformer-impl local").transformer_impl == "local"
    with pytest.raises(ConfigurationError, match="transformer_engine: not.*use --transformer-impl local"):
        validated("--transformer-impl transformer_engine")


def test_every_row_names_a_flag() -> None:
    rows = {*capabilities.ARGUMENTS_NOT_BUILT, *VALUES_NOT_BUILT, *capabilities.BUILT_WITHIN_GROUPS}
    assert rows <= set(all_flags())
    assert set(capabilities.GROUPS_NOT_BUILT) <= {flag.group for flag in all_flags().values()}


BUILT = [
    "--group-query-attention --num-query-groups 2",
    "--position-embedding-type rope --rotary-percent 0.5 --use-rope-scaling",
    "--position-embedding-type rope --rotary-interleaved --no-rope-fusion",
    "--position-embedding-type none",
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 32",
    "--window-size 16 0 --qk-layernorm --normalization RMSNorm --apply-layernorm-1p",
    "--swiglu --untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias",
    "--squared-relu",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "--recompute-activations",
    "--recompute-granularity selective --recompute-modules core_attn layernorm mlp",
    "--fp16 --initial-loss-scale 1024 --hysteresis 1",
    "--bf16 --grad-reduce-in-bf16",
    "--bf16 --fp8-format hybrid --fp8-margin 1 --fp8-amax-history-len 8 --fp8-amax-compute-algo max --no-fp8-wgrad",
    "--bf16 --fp8-format e4m3 --fp8-recipe blockwise --first-last-layers-bf16 --num-layers-at-end-in-bf16 0",
    "--bf16 --fp8-format hybrid --use-distributed-optimizer --fp8-param-gather",
    "--fp8-recipe delayed --fp8-margin 0 --num-layers-at-start-in-bf16 1",
    "--optimizer sgd --sgd-momentum 0.5",
    "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer --main-grads-dtype bf16",
    "--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1",
    "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-iters 2",
    "--save /tmp/x --save-interval 2 --load /tmp/x --ckpt-format torch --finetune --no-load-optim",
    "--skip-train --eval-iters 2",
    "--profile --use-pytorch-profiler --profile-ranks 0 1",
    "--exit-interval 2 --exit-duration-in-mins 1 --exit-signal-handler --manual-gc --manual-gc-interval 2",
    "--reset-position-ids --reset-attention-mask --eod-mask-loss --attention-backend unfused",
    "--deterministic-mode --calculate-per-token-loss --no-check-for-nan-in-loss-and-grad",
    "--use-cpu-initialization --iterations-to-skip 2 3 --check-weight-hash-across-dp-replicas-interval 2",
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion",
    "--no-rope-fusion --no-gradient-accumulation-fusion --no-async-tensor-model-parallel-allreduce",
    "--no-persist-layer-norm --cross-entropy-loss-fusion --no-scatter-gather-tensors-in-pipeline",
    "--use-distributed-optimizer --ckpt-fully-parallel-load --dist-ckpt-strictness log_all",
    "--log-throughput --log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --log-progress",
    "--tensorboard-dir /tmp/x --log-timers-to-tensorboard --log-memory-to-tensorboard",
    "--apply-query-key-layer-scaling --attention-softmax-in-fp32",
    "--data-cache-path /tmp/x --no-mmap-bin-files --no-create-attention-mask-in-dataloader",
    "--dataloader-type cyclic --num-workers 0 --no-data-sharding",
    "--num-experts 4 --disable-bias-linear --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-grouped-gemm",
]


@pytest.mark.parametrize("flags", BUILT)
def test_built_capability_is_accepted(flags: str) -> None:
    validated(flags)


@pytest.mark.parametrize("flag", WITHOUT_EFFECT, ids=lambda flag: flag.dest)
def test_flag_without_effect_is_named_in_one_warning(flag: Flag, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        validated(" ".join(words_for(flag)))
    assert [record.message for record in caplog.records] == [f"accepted without effect: {flag.names[0]}"]


def test_many_flags_without_effect_make_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        validated("--log-straggler --use-mcore-models --ckpt-fully-parallel-save")
    (record,) = caplog.records
    for flag in ("--log-straggler", "--use-mcore-models", "--ckpt-fully-parallel-save"):
        assert flag in record.message


def test_other_ranks_do_not_warn(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        validated("--log-straggler")
    assert not caplog.records
