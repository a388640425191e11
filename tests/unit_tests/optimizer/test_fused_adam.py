"""One pass over memory: the bits of torch's AdamW on multiplied gradients, and the compiled kernels beside fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.fusions import compiled
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.fused_adam import AdamState, FusedAdam, adamw, rates_of, update
from megatron.core.optimizer.precision_aware_adam import PrecisionAwareAdam
from megatron.core.optimizer.precision_aware_sweep import update_whole_blocks
from megatron.core.optimizer.state_storage import BLOCK
from tests.unit_tests.optimizer.training import FEATURES, TinyModel, build, train, weights
from tests.worker_pool import run_ranks

SHAPES = [(3, 40_001), (70_003,), (5, 7), (1,), (64, 48)]
RATES = {"lr": 1e-2, "weight_decay": 0.1}
GROUP = {**RATES, "betas": (0.9, 0.999), "eps": 1e-8}


@contextmanager
def uncompiled() -> Iterator[None]:
    """What would be compiled, as it is written: tracing takes seconds, and changes nothing."""
    sweep, compiled.sweep = compiled.sweep, lambda function: function
    try:
        yield
    finally:
        compiled.sweep = sweep


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def stepped(optimizer: Any, params: list[Tensor], multiplier: float, rounded: dict[Tensor, Tensor]) -> list[Any]:
    """State after three steps; `FusedAdam` multiplies and rounds itself."""
    for step in range(3):
        grads = drawn(step + 1, 1e-3)
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        if isinstance(optimizer, FusedAdam):
            optimizer.grad_multiplier, optimizer.weights = multiplier, rounded
            optimizer.step()
            assert optimizer.grad_multiplier == 1.0
        else:
            torch._foreach_mul_([param.grad for param in params], multiplier)
            optimizer.step()
            for param, target in rounded.items():
                target.copy_(param)
    state = [[optimizer.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq", "step")]
    return [params, *state, list(rounded.values())]


def of_torch(multiplier: float, *, rounds: bool) -> list[Any]:
    params = drawn(0)
    rounded = {param: param.bfloat16() for param in params} if rounds else {}
    return stepped(torch.optim.AdamW(params, fused=True, **RATES), params, multiplier, rounded)


def ours(multiplier: float, *, rounds: bool, **settings: Any) -> list[Any]:
    params = drawn(0)
    rounded = {param: param.bfloat16() for param in params} if rounds else {}
    optimizer = FusedAdam([{"params": params}], OptimizerConfig(**RATES, **settings))
    return stepped(optimizer, params, multiplier, rounded)


@pytest.mark.parametrize(("multiplier", "rounds"), [(0.37, True), (0.37, False), (1.0, True), (1.0, False)])
def test_bits_are_those_of_a_pass_for_each_operation(multiplier: float, rounds: bool) -> None:
    torch.testing.assert_close(ours(multiplier, rounds=rounds), of_torch(multiplier, rounds=rounds), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [True, False])
def test_the_compiled_kernel_gives_the_same_numbers(rounds: bool) -> None:
    require_the_same_numbers(rounds)


@pytest.mark.parametrize("rounds", [True, False])
def test_the_kernel_gives_the_same_numbers(rounds: bool) -> None:
    with uncompiled():
        require_the_same_numbers(rounds)


def require_the_same_numbers(rounds: bool) -> None:
    *found, rounded = ours(0.37, rounds=rounds, torch_compile=True)
    *expected, _ = of_torch(0.37, rounds=rounds)
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=1e-8)
    assert all(torch.equal(one, param.bfloat16()) for one, param in zip(rounded, found[0]))


def test_the_formula_is_adamw_in_fp64() -> None:
    main, grad, exp_avg, exp_avg_sq = (torch.randn(1000, dtype=torch.float64) for _ in range(4))
    exp_avg_sq = exp_avg_sq.square()
    (rates,) = rates_of(torch.tensor([3.0]), GROUP, 0.37)
    found = adamw(*(x.float() for x in (main, grad, exp_avg, exp_avg_sq)), rates)
    exp_avg = 0.9 * exp_avg + 0.1 * 0.37 * grad
    exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * (0.37 * grad).square()
    step = (exp_avg / (1 - 0.9**3)) / ((exp_avg_sq / (1 - 0.999**3)).sqrt() + 1e-8)
    exact = (main * (1 - 1e-2 * 0.1) - 1e-2 * step, exp_avg, exp_avg_sq)
    torch.testing.assert_close([x.double() for x in found], list(exact), rtol=5e-7, atol=2e-7)


def test_16_bit_gradients_are_multiplied_in_fp32() -> None:
    narrow = [grad.bfloat16() for grad in drawn(1)]
    after = []
    for grads in (narrow, [grad.float() for grad in narrow]):
        states = [
            AdamState(main, grad, torch.zeros_like(main), torch.zeros_like(main), torch.zeros(()))
            for main, grad in zip(drawn(0), grads)
        ]
        update(states, GROUP, 0.37, compile_it=False)
        after.append([state.main for state in states])
    torch.testing.assert_close(*after, rtol=0, atol=0)
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(narrow, drawn(1)))


# --- layouts ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_shards_give_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    found = run_ranks(2, whole_and_shards, dtype)
    whole = found[0][0]
    for results in found:
        for one in results:
            torch.testing.assert_close(one, whole, rtol=0, atol=0)


def whole_and_shards(dtype: torch.dtype) -> list[Any]:
    parallel_state.initialize_model_parallel()
    runs = []
    with uncompiled():
        for sharded in (False, True):
            ddp, optimizer = build(dtype, sharded=sharded, clip_grad=0.0, torch_compile=True)
            train(ddp, optimizer, range(4))
            runs.append(weights(ddp))
    return runs


# --- loss scale ---


def test_squares_that_overflow_are_no_gradients_that_do() -> None:
    """Scaled gradients of 2^80: finite, their squares are not."""
    model = TinyModel().half()
    config = OptimizerConfig(lr=1e-2, fp16=True, params_dtype=torch.float16, loss_scale=2.0**80, clip_grad=0.0)
    optimizer = get_megatron_optimizer(config, [model])
    for param in model.parameters():
        param.main_grad = torch.full(param.shape, 2.0**80)  # type: ignore[attr-defined]
    updated, norm, _ = optimizer.step()
    assert updated and norm == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5)
    next(model.parameters()).main_grad.view(-1)[3] = float("nan")  # type: ignore[attr-defined]
    assert optimizer.step() == (False, None, None)


def test_what_nobody_has_used_is_forgotten() -> None:
    """A gradient that was clipped, and then not applied, does not clip the next one."""
    model = TinyModel()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2), [model])
    model(torch.ones(2, FEATURES)).sum().backward()
    optimizer.prepare_grads()
    norm = optimizer.clip_grad_norm(0.5)
    assert norm > 0.5 and optimizer.get_grad_norm() == pytest.approx(0.5, rel=1e-5)
    optimizer.prepare_grads()
    assert optimizer.get_grad_norm() == norm


# --- low precision ---

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
FORMS = [
    *({"exp_avg_dtype": kind, "exp_avg_sq_dtype": kind, "store_param_remainders": True} for kind in TYPES),
    {"exp_avg_dtype": torch.uint8, "main_params_dtype": torch.float16},
    {"exp_avg_dtype": torch.bfloat16, "store_param_remainders": False},
]


@pytest.mark.parametrize("settings", FORMS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_a_kernel_stores_the_bits_of_reading_updating_and_writing(settings: dict[str, Any]) -> None:
    first, step = BLOCK // 2, 3
    slots = [slot_with_state(first, settings) for _ in range(2)]
    grad = torch.randn(slots[0].weights.numel(), generator=torch.Generator().manual_seed(2)).bfloat16()
    start, end = slots[0].whole_blocks
    assert (start, (end - start) % BLOCK) == (first, 0) and end - start > 3 * BLOCK
    kernel, reference = slots
    (rates,) = rates_of(torch.tensor([float(step)]), GROUP, 0.37)
    new = adamw(*(x for x in reads(reference, start, end, grad)), rates)
    for storage, values in zip(reference.storages.values(), new):
        storage.write(start, values, step)
    keeps_weights = settings.get("store_param_remainders", True) and "main_params_dtype" not in settings
    if not keeps_weights:
        reference.weights[start:end].copy_(reference.param.read(start, end))
    with uncompiled():
        update_whole_blocks(
            kernel.storages, None if keeps_weights else kernel.weights, grad, first, (start, end), step, GROUP, 0.37
        )
    assert torch.equal(kernel.weights, reference.weights)
    for one, other in zip(kernel.storages.values(), reference.storages.values()):
        assert torch.equal(one.read_all(), other.read_all())


def reads(slot: Any, start: int, end: int, grad: Tensor) -> list[Tensor]:
    main, exp_avg, exp_avg_sq = (storage.read(start, end) for storage in slot.storages.values())
    return [main, grad[start:end], exp_avg, exp_avg_sq]


def slot_with_state(first: int, settings: dict[str, Any]) -> Any:
    """A piece that begins in the middle of a block, after a step."""
    numel = 5 * BLOCK
    piece = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    slot = optimizer_of(piece, first, settings).slot_of(piece)
    for i, storage in enumerate([slot.exp_avg, slot.exp_avg_sq]):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(i + 5)) * 1e-2
        storage.write(0, values.square() if i else values, step=1)
    return slot


def optimizer_of(piece: Tensor, first: int, settings: dict[str, Any]) -> PrecisionAwareAdam:
    config = OptimizerConfig(
        **RATES,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_precision_aware_optimizer=True,
        use_distributed_optimizer=True,
        **settings,
    )
    optimizer = PrecisionAwareAdam([{"params": [piece]}], config)
    optimizer.adopt(piece, first, on_host=False)
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.uint8])
def test_compiled_steps_of_low_precision_stay_near(kind: torch.dtype) -> None:
    require_near(kind)


def test_steps_of_low_precision_by_blocks_stay_near() -> None:
    with uncompiled():
        require_near(torch.uint8)


def require_near(kind: torch.dtype) -> None:
    weights_after = []
    for compile_it in (False, True):
        piece = torch.randn(5 * BLOCK + 3, generator=torch.Generator().manual_seed(0)).bfloat16()
        settings = {"exp_avg_dtype": kind, "exp_avg_sq_dtype": kind, "store_param_remainders": False}
        optimizer = optimizer_of(piece, 100, settings | {"torch_compile": compile_it})
        for step in range(4):
            grad = torch.randn(piece.shape, generator=torch.Generator().manual_seed(step))
            piece.decoupled_grad = grad  # type: ignore[attr-defined]
            optimizer.grad_multiplier = 0.37
            optimizer.step()
        weights_after.append(optimizer.slot_of(piece).param.read_all())
    # a value in 10^6 lies so near the random number that the last bit decides how it is rounded
    assert (weights_after[0] - weights_after[1]).abs().quantile(0.99) < 1e-6
