from typing import Any

import pytest
import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import owned_span
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.optimizer.training import BATCH, FEATURES, TinyModel, build, train, weights
from tests.worker_pool import run_ranks

STEPS = range(6)


def trained(dtype: torch.dtype, settings: dict[str, Any], blow_up: tuple[int, ...] = ()) -> tuple[Any, Any]:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(dtype, **settings)
    results = train(ddp, optimizer, STEPS, blow_up=blow_up)
    return results, weights(ddp)


# --- one process against torch
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_fp32_equals_torch(algorithm: str, clip_grad: float) -> None:
    model = TinyModel()
    decays = {True: 0.1, False: 0.0}
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in decays.items()
    ]
    kinds = {
        "adam": lambda: torch.optim.AdamW(groups, lr=1e-2),
        "sgd": lambda: torch.optim.SGD(groups, 1e-2, 0.9),
    }
    reference = kinds[algorithm]()
    norms = []
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, FEATURES, generator=generator), torch.randn(BATCH, 5, generator=generator)
        reference.zero_grad()
        (model(x) - y).square().mean().backward()
        limit = clip_grad or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        reference.step()
    ((results, found),) = run_ranks(1, trained, torch.float32, {"optimizer": algorithm, "clip_grad": clip_grad})
    assert [ok for ok, _, _ in results] == [True] * len(STEPS)
    assert [norm for _, norm, _ in results] == pytest.approx(norms, rel=1e-5)
    assert all(zeros is None for _, _, zeros in results)
    torch.testing.assert_close(found, {name: p.detach() for name, p in model.named_parameters()})


def test_gradients_of_a_step_do_not_leak_into_the_next() -> None:
    """Even if the caller zeroes the buffers only."""
    run_ranks(1, check_no_leak)


def check_no_leak() -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build()
    x = torch.randn(BATCH, FEATURES)
    grads = []
    for _ in range(2):
        ddp.zero_grad_buffer()
        ddp(x).square().sum().backward()
        grads.append(ddp.module[3].bias.main_grad.clone())
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
        optimizer.step()
        assert all(param.grad is None for param in ddp.parameters())
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_plain_module_without_data_parallel_wrapper() -> None:
    model = TinyModel()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2), [model])
    before = model[0].weight.detach().clone()
    model(torch.randn(2, FEATURES)).sum().backward()
    assert optimizer.step()[0] and not torch.equal(model[0].weight, before)


# --- layouts
# ------------------------------------------------------------------------------------------------------

PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16, 16-bit gradients": (torch.bfloat16, {"fp32_grads": False}),
    "sgd": (torch.float32, {"optimizer": "sgd"}),
    "clipped": (torch.float32, {"clip_grad": 0.3}),
}


# Four ranks only with fp32 sums: 16-bit sums of more than two terms depend on the order, which collectives
# choose.
LAYOUTS = [*((name, ranks) for name in PRECISIONS for ranks in (1, 2)), ("fp32", 4), ("bf16", 4)]


@pytest.mark.parametrize(("precision", "world_size"), LAYOUTS)
def test_distributed_optimizer_equals_the_plain_one(precision: str, world_size: int) -> None:
    found = run_ranks(world_size, plain_and_sharded, *PRECISIONS[precision])
    for (plain_results, plain), (results, sharded) in found:
        assert all(torch.equal(weight, found[0][1][1][name]) for name, weight in sharded.items()), "replicas differ"
        # the fused kernel rounds the tails of tensors differently, and shards have other tails
        torch.testing.assert_close(sharded, plain, rtol=1e-6, atol=1e-7)
        for (ok, norm, zeros), (plain_ok, plain_norm, plain_zeros) in zip(results, plain_results):
            assert ok and plain_ok and zeros == plain_zeros
            assert norm == pytest.approx(plain_norm, rel=1e-6)


def plain_and_sharded(dtype: torch.dtype, settings: dict[str, Any]) -> list[tuple[Any, Any]]:
    parallel_state.initialize_model_parallel()
    outcomes = []
    for sharded in (False, True):
        ddp, optimizer = build(dtype, sharded=sharded, log_num_zeros_in_grad=True, **settings)
        outcomes.append((train(ddp, optimizer, STEPS), weights(ddp)))
    return outcomes


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_equal_one(sharded: bool) -> None:
    """Adam turns a rounding error of a gradient near zero into one of the update, hence weights to 1e-5."""
    ((results, expected),) = run_ranks(1, trained, torch.float32, {})
    for own_results, found in run_ranks(2, trained, torch.float32, {"sharded": sharded}):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [norm for _, norm, _ in own_results] == pytest.approx([norm for _, norm, _ in results], rel=1e-5)


def test_owned_spans_tile_every_parameter() -> None:
    for start in range(12):
        for end in range(start + 1, 13):
            spans = [owned_span((start, end), (rank * 4, rank * 4 + 4)) for rank in range(3)]
            elements = [i for span in spans if span is not None for i in range(*span)]
            assert elements == list(range(end - start))


# --- precision
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_weights_are_the_rounded_main_params(sharded: bool) -> None:
    run_ranks(2, check_rounding, sharded)


def check_rounding(sharded: bool) -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(torch.bfloat16, sharded=sharded, lr=1e-5)
    before = weights(ddp)
    train(ddp, optimizer, range(3))
    mains = optimizer.get_parameters()
    assert mains and all(main.dtype == torch.float32 for main in mains)
    moved = 0
    for model_param, main in optimizer.pairs():
        if not sharded:
            assert torch.equal(model_param.detach(), main.bfloat16().view_as(model_param))
            moved += int((main - model_param.float()).count_nonzero())
        assert model_param.main_param is main
    assert sharded or moved > 100, "updates below the resolution of bf16 must live on in the main params"
    assert weights(ddp).keys() == before.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_fp16_skips_overflows_on_all_ranks_and_adapts_the_scale(sharded: bool) -> None:
    for results, scales, unchanged in run_ranks(2, fp16_run, sharded):
        assert [ok for ok, _, _ in results] == [True, False, False, True, True, True]
        assert [norm is None for _, norm, _ in results] == [False, True, True, False, False, False]
        assert unchanged == [False, True, True, False, False, False]
        assert scales == [
            256,
            256,
            128,
            128,
            256,
            256,
        ]  # hysteresis lets one overflow pass; two clean steps double


def fp16_run(sharded: bool) -> tuple[Any, list[float], list[bool]]:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(torch.float16, sharded=sharded, initial_loss_scale=256, loss_scale_window=2)
    results, scales, unchanged = [], [], []
    for step in STEPS:
        before = weights(ddp)
        results += train(ddp, optimizer, range(step, step + 1), blow_up=(1, 2))
        scales.append(optimizer.get_loss_scale().item())
        unchanged.append(all(torch.equal(weight, before[name]) for name, weight in weights(ddp).items()))
    return results, scales, unchanged


def test_the_loss_scale_cancels() -> None:
    ((unscaled, expected),) = run_ranks(1, trained, torch.bfloat16, {})
    ((scaled, found),) = run_ranks(1, trained, torch.bfloat16, {"loss_scale": 1024.0})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # a power of two changes no bit
    assert [norm for _, norm, _ in scaled] == [norm for _, norm, _ in unscaled]


def test_reload_model_params_takes_over_loaded_weights() -> None:
    run_ranks(2, check_reload)


def check_reload() -> None:
    parallel_state.initialize_model_parallel()
    for sharded in (False, True):
        ddp, optimizer = build(torch.bfloat16, sharded=sharded, lr=0.0, min_lr=0.0)
        with torch.no_grad():
            for param in ddp.parameters():
                param.fill_(0.5)
        optimizer.reload_model_params()
        train(ddp, optimizer, range(1))
        assert all((weight == 0.5).all() for weight in weights(ddp).values())


# --- statistics over model-parallel ranks
# -----------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_norm_counts_each_element_of_the_model_once(sharded: bool) -> None:
    """TP 2 × DP 2: a cut weight (3s and 4s), a replicated one (1s), and a tied copy that must not count."""
    for norm, zeros in run_ranks(4, norm_under_tp, sharded):
        assert norm == pytest.approx((10 * 9 + 10 * 16 + 6 * 1) ** 0.5, rel=1e-7)
        assert zeros == 4.0


def norm_under_tp(sharded: bool) -> tuple[float, float]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model = nn.ParameterDict({"cut": torch.zeros(5, 2), "whole": torch.zeros(10), "tied": torch.zeros(3, 3)})
    model["cut"].tensor_model_parallel = True
    model["tied"].shared = True
    model["whole"].sequence_parallel = True
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=sharded),
        model,
    )
    config = OptimizerConfig(lr=0.1, use_distributed_optimizer=sharded, clip_grad=1.0, log_num_zeros_in_grad=True)
    optimizer = get_megatron_optimizer(config, [ddp])
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    model["cut"].main_grad.fill_(3.0 + tp_rank)
    model["whole"].main_grad[:6] = 1.0
    model["tied"].main_grad.fill_(100.0)
    ddp.finish_grad_sync()
    _, norm, zeros = optimizer.step()
    return norm, zeros


# --- choice and groups
# --------------------------------------------------------------------------------------------


def test_kind_of_optimizer() -> None:
    run_ranks(1, check_kinds)


def check_kinds() -> None:
    parallel_state.initialize_model_parallel()
    assert type(build()[1]) is FP32Optimizer
    assert type(build(torch.bfloat16)[1]) is Float16OptimizerWithFloat16Params
    for dtype in (torch.float32, torch.bfloat16):
        assert type(build(dtype, sharded=True)[1]) is DistributedOptimizer


def group_sizes(optimizer: Any) -> dict[tuple[Any, ...], int]:
    identity = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    return {tuple(group[name] for name in identity): len(group["params"]) for group in optimizer.param_groups}


def test_param_groups() -> None:
    model = TinyModel()
    model[0].weight.is_embedding_or_output_parameter = True
    config = OptimizerConfig(lr=1e-2, min_lr=1e-4, decoupled_lr=5e-2)
    optimizer = get_megatron_optimizer(config, [model], scale_lr_cond=lambda name, p: name == "3.bias", lr_mult=10.0)
    assert group_sizes(optimizer) == {
        (1.0, 1.0, False, True): 1,
        (0.0, 1.0, False, False): 3,
        (1.0, 1.0, False, False): 1,
        (0.0, 10.0, False, False): 1,
    }
    bounds = [(group["max_lr"], group["min_lr"]) for group in optimizer.param_groups]
    assert bounds == [(5e-2, 1e-4), (1e-2, 1e-4), (1e-2, 1e-4), (1e-2, 1e-4)]
    everything_decays = get_megatron_optimizer(config, [TinyModel()], no_weight_decay_cond=lambda name, p: False)
    assert group_sizes(everything_decays) == {(1.0, 1.0, False, False): 6}


@pytest.mark.parametrize("sharded", [False, True])
def test_experts_are_chained_and_clipped_by_the_common_norm(sharded: bool) -> None:
    for norm, kinds in run_ranks(2, expert_step, sharded):
        assert kinds == 2
        assert norm == pytest.approx((4 * 1.0 + 4 * 4.0 + 4 * 9.0) ** 0.5, rel=1e-6)  # one dense weight, two experts


def expert_step(sharded: bool) -> tuple[float, int]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model = nn.ParameterDict({"dense": torch.zeros(2, 2), "expert": torch.zeros(2, 2)})
    model["expert"].allreduce = False
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=sharded),
        model,
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=sharded), [ddp])
    assert isinstance(optimizer, ChainedOptimizer)
    model["dense"].main_grad.fill_(1.0)
    model["expert"].main_grad.fill_(2.0 * (2.0 + torch.distributed.get_rank()))  # halved by the average over ranks
    ddp.finish_grad_sync()
    ok, norm, _ = optimizer.step()
    assert ok and all((weight != 0.0).all() for weight in model.values())
    return norm, len(optimizer.chained_optimizers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lr": None}, "lr is not set"),
        ({"lr": 0.1, "use_distributed_optimizer": True}, "wrapped in DistributedDataParallel, got TinyModel"),
    ],
)
def test_bad_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_megatron_optimizer(OptimizerConfig(**config), [TinyModel()])


def test_sharding_must_be_set_on_both_sides() -> None:
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        DistributedDataParallelConfig(),
        TinyModel(),
    )
    with pytest.raises(ValueError, match="use_distributed_optimizer is set in OptimizerConfig but not"):
        get_megatron_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [ddp])
    with pytest.raises(ValueError, match="no trainable parameters"):
        get_megatron_optimizer(OptimizerConfig(lr=0.1), [nn.GELU()])
