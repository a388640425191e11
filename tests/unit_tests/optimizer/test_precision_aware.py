"""The optimizer whose state lies in types and on devices of choice, against the ordinary distributed one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.precision_aware_optimizer import choose_share
from tests.unit_tests.optimizer.test_optimizer_checkpoint import (
    load_and_train,
    load_train_save,
    require_continued,
    save_and_go_on,
)
from tests.unit_tests.optimizer.training import build, train, weights
from tests.worker_pool import run_ranks

AWARE = {"sharded": True, "use_precision_aware_optimizer": True}
LOW = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
FP16 = {"exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16}
FP8 = {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.uint8}
BF16_GRADS = {"main_grads_dtype": torch.bfloat16, "fp32_grads": False}
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.6}
SCALED = {"initial_loss_scale": 256, "loss_scale_window": 2}

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32-bf16-moments": (torch.float32, LOW),
    "bf16-remainders": (torch.bfloat16, {}),
    "bf16-no-remainders": (torch.bfloat16, {"store_param_remainders": False}),
    "bf16-all-16-bit": (torch.bfloat16, {**LOW, **BF16_GRADS}),
    "bf16-fp16-main": (torch.bfloat16, {**FP16, "main_params_dtype": torch.float16}),
    "bf16-fp8": (torch.bfloat16, FP8),
    "fp16": (torch.float16, {**FP16, **SCALED}),
    "fp32-offload": (torch.float32, OFFLOAD),
    "bf16-fp8-offload": (torch.bfloat16, {**FP8, **OFFLOAD, "optimizer_offload_fraction": 1.0}),
}


def train_one(dtype: torch.dtype, settings: dict[str, Any], steps: int) -> Any:
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    ddp, optimizer = build(dtype, **settings)
    results = train(ddp, optimizer, range(steps))
    return [norm for _, norm, _ in results], weights(ddp), [g.numel() for g in optimizer.get_parameters()]


@pytest.mark.parametrize("offload", [{}, OFFLOAD, {**OFFLOAD, "overlap_cpu_optimizer_d2h_h2d": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fp32_state_gives_the_ordinary_optimizers_numbers_bitwise(dtype: torch.dtype, offload: dict[str, Any]) -> None:
    scaled = SCALED if dtype == torch.float16 else {}
    expected = run_ranks(2, train_one, dtype, {"sharded": True, **scaled}, 4)
    for own, wanted in zip(run_ranks(2, train_one, dtype, {**AWARE, **scaled, **offload}, 4), expected):
        assert own[0] == wanted[0]
        torch.testing.assert_close(own[1], wanted[1], rtol=0, atol=0)


def test_remainders_complete_bf16_weights_to_fp32_ones() -> None:
    """Bitwise but for exact ties, of which the model's weight is the upper and not the even one."""
    expected = run_ranks(2, main_weights, {"sharded": True})
    for own, wanted in zip(run_ranks(2, main_weights, AWARE), expected):
        for a, b in zip(own, wanted):
            assert torch.equal(a, b)


def main_weights(settings: dict[str, Any]) -> list[torch.Tensor]:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(torch.bfloat16, **settings)
    train(ddp, optimizer, range(1))
    return [optimizer.param_state(shard)["param"].clone() for shard in optimizer.shards]  # type: ignore[attr-defined]


def deviations(steps: int) -> dict[str, float]:
    """How far weights are from those of fp32 state, as a share of the way that they went."""
    found = {}
    for name, (dtype, settings) in CASES.items():
        scaled = SCALED if dtype == torch.float16 else {}
        _, start, _ = train_one(dtype, {"sharded": True, **scaled}, 0)
        expected, own = (
            train_one(dtype, {**form, **scaled}, steps)[1] for form in ({"sharded": True}, AWARE | settings)
        )
        way, deviation = (
            torch.cat([(expected[n] - other[n]).flatten() for n in start]).norm() for other in (start, own)
        )
        found[name] = float(deviation / way)
    return found


def test_low_precision_stays_near() -> None:
    (found,) = run_ranks(1, deviations, 8)
    allowed = {
        "fp32": 0.0,
        "fp32-bf16-moments": 0.01,
        "bf16-remainders": 1e-4,
        "bf16-no-remainders": 0.0,
        "bf16-all-16-bit": 0.03,
        "bf16-fp16-main": 0.05,
        "bf16-fp8": 0.15,
        "fp16": 0.01,
        "fp32-offload": 0.0,
        "bf16-fp8-offload": 0.15,
    }
    assert {name: deviation for name, deviation in found.items() if deviation > allowed[name]} == {}
    assert all(found[name] > 0 for name in found if "fp8" in name or "16-bit" in name), "nothing was rounded"


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted_bitwise(name: str, tmp_path: Path) -> None:
    case = (CASES[name][0], {**AWARE, **CASES[name][1]})
    expected = run_ranks(2, save_and_go_on, str(tmp_path), case, 3, 5)
    found = run_ranks(2, load_and_train, str(tmp_path), case, range(3, 5))
    for own, own_expected in zip(found, expected):
        require_continued(own, own_expected, rtol=0, atol=0)


@pytest.mark.parametrize("sharding_type", ["dp_zero_gather_scatter", "fully_sharded_bucket_space"])
def test_forms_that_describe_buffers_resume_bitwise(sharding_type: str, tmp_path: Path) -> None:
    case = (torch.bfloat16, {**AWARE, **FP8, **OFFLOAD})
    expected = run_ranks(2, save_and_go_on, str(tmp_path), case, 3, 5, sharding_type)
    found = run_ranks(2, load_and_train, str(tmp_path), case, range(3, 5), sharding_type)
    for own, own_expected in zip(found, expected):
        require_continued(own, own_expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bf16-remainders", "bf16-all-16-bit", "bf16-fp8-offload"])
def test_state_moves_to_other_ranks_and_back(name: str, tmp_path: Path) -> None:
    """To within bf16: other ranks round the model's gradients elsewhere; blocks of other pieces have other scales."""
    case = (CASES[name][0], {**AWARE, **CASES[name][1]})
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    (expected,) = run_ranks(1, save_and_go_on, str(tmp_path / "1"), case, 2, 6)
    run_ranks(2, load_train_save, str(tmp_path / "1"), str(tmp_path / "2"), case)
    (found,) = run_ranks(1, load_and_train, str(tmp_path / "2"), case, range(4, 6))
    require_continued(found, (expected[0][2:], *expected[1:]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("to_low", [True, False])
def test_ordinary_and_low_precision_state_continue_each_other(to_low: bool, tmp_path: Path) -> None:
    """From checkpoints in fp32 both ways; what was rounded is all that differs."""
    forms = [{"sharded": True}, {**AWARE, **LOW, "main_params_dtype": torch.float16}]
    source, target = forms if to_low else forms[::-1]
    expected = run_ranks(2, save_and_go_on, str(tmp_path), (torch.bfloat16, source), 2, 4)
    found = run_ranks(2, load_and_train, str(tmp_path), (torch.bfloat16, target), range(2, 4))
    for own, own_expected in zip(found, expected):
        require_continued(own, own_expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("fraction, expected", [(0.0, set()), (0.6, {0, 2}), (0.5, {2, 3}), (1.0, {0, 1, 2, 3})])
def test_offloaded_share_fills_the_fraction(fraction: float, expected: set[int]) -> None:
    assert choose_share([20, 30, 40, 10], fraction) == expected


def share_on_host(fraction: float) -> tuple[float, bool]:
    parallel_state.initialize_model_parallel()
    settings = {**AWARE, **OFFLOAD, "optimizer_offload_fraction": fraction}
    ddp, optimizer = build(torch.float32, **settings)
    train(ddp, optimizer, range(1))
    inner = optimizer.optimizer
    slots = [inner.slot_of(main) for main in optimizer.get_parameters()]
    on_host = sum(slot.weights.numel() for slot in slots if slot.on_host)
    copies = all(slot.param.values.data_ptr() != slot.weights.data_ptr() for slot in slots if slot.on_host)
    return on_host / sum(slot.weights.numel() for slot in slots), copies


def test_offloaded_share_has_memory_of_its_own() -> None:
    ((share, copies),) = run_ranks(1, share_on_host, 0.7)
    assert 0.6 < share <= 0.7
    assert copies


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_precision_aware_optimizer": True}, "needs optimizer adam and use_distributed_optimizer"),
        ({**AWARE, "optimizer": "sgd"}, "found optimizer \\(sgd\\)"),
        ({**AWARE, "exp_avg_dtype": torch.float64}, "exp_avg_dtype .* must be one of"),
        ({**AWARE, "main_grads_dtype": torch.bfloat16}, "needs weights of that type"),
        ({**AWARE, "main_params_dtype": torch.float16}, "float32 weights are their own"),
        ({"optimizer_cpu_offload": True}, "needs use_precision_aware_optimizer"),
        ({**AWARE, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.5}, "between 0 and 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    known = {name: value for name, value in settings.items() if name != "sharded"}
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(use_distributed_optimizer=settings.get("sharded", False), **known)


def build_with_wide_buffers() -> str:
    parallel_state.initialize_model_parallel()
    with pytest.raises(ValueError, match="set grad_reduce_in_fp32=False") as error:
        build(torch.bfloat16, **AWARE, main_grads_dtype=torch.bfloat16, fp32_grads=True)
    return str(error.value)


def test_gradients_that_are_wider_than_asked_for_are_refused() -> None:
    run_ranks(1, build_with_wide_buffers)
