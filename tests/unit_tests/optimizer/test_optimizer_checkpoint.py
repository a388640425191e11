from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from tests.unit_tests.optimizer.training import build, train, weights
from tests.worker_pool import run_ranks

CASES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float16, {"initial_loss_scale": 256, "loss_scale_window": 2}),
    (torch.float32, {"sharded": True}),
    (torch.bfloat16, {"sharded": True}),
    (torch.float16, {"sharded": True, "initial_loss_scale": 256, "loss_scale_window": 2}),
    (torch.float32, {"optimizer": "sgd"}),
    (torch.bfloat16, {"optimizer": "sgd", "sharded": True}),
]
SHARDING_TYPES = ["dp_zero_gather_scatter", "fully_sharded_bucket_space"]
Case = tuple[torch.dtype, dict[str, Any]]


def sharded_state(ddp: Any, optimizer: Any, is_loading: bool, sharding_type: str | None) -> dict[str, Any]:
    model = ddp.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": sharding_type} if sharding_type else None
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def save_and_go_on(folder: str, case: Case, save_at: int, end: int, sharding_type: str | None = None) -> Any:
    """Results after the save, and final weights, of a run that is not interrupted."""
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(case[0], **case[1])
    train(ddp, optimizer, range(save_at))
    dist_checkpointing.save(sharded_state(ddp, optimizer, False, sharding_type), folder)
    return train(ddp, optimizer, range(save_at, end)), weights(ddp), optimizer.get_loss_scale().item()


def load_and_train(folder: str, case: Case, steps: range, sharding_type: str | None = None) -> Any:
    """Results and weights; the model starts from other weights, so that what is not loaded shows."""
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(case[0], **case[1])
    with torch.no_grad():
        for param in ddp.parameters():
            param.zero_()
    optimizer.reload_model_params()
    loaded = dist_checkpointing.load(sharded_state(ddp, optimizer, True, sharding_type), folder)
    ddp.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    results = train(ddp, optimizer, steps)
    return results, weights(ddp), optimizer.get_loss_scale().item()


def require_continued(found: Any, expected: Any, **tolerance: float) -> None:
    (results, found_weights, scale), (expected_results, expected_weights, expected_scale) = found, expected
    torch.testing.assert_close(found_weights, expected_weights, **tolerance)
    norms = [[norm for _, norm, _ in some] for some in (results, expected_results)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance["rtol"])
    assert scale == expected_scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resumed_equals_uninterrupted_bitwise(case: Case, tmp_path: Path) -> None:
    expected = run_ranks(2, save_and_go_on, str(tmp_path), case, 3, 5)
    found = run_ranks(2, load_and_train, str(tmp_path), case, range(3, 5))
    for own, own_expected in zip(found, expected):
        require_continued(own, own_expected, rtol=0, atol=0)


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_other_forms_of_the_sharded_state_resume_bitwise(sharding_type: str, tmp_path: Path) -> None:
    case = (torch.bfloat16, {"sharded": True})
    expected = run_ranks(2, save_and_go_on, str(tmp_path), case, 3, 5, sharding_type)
    found = run_ranks(2, load_and_train, str(tmp_path), case, range(3, 5), sharding_type)
    for own, own_expected in zip(found, expected):
        require_continued(own, own_expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", [CASES[3], CASES[0]], ids=str)
def test_state_moves_from_one_rank_to_two_and_back(case: Case, tmp_path: Path) -> None:
    """Sums over other ranks round differently, and Adam passes that on; hence 1e-5 instead of bitwise."""
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    (expected,) = run_ranks(1, save_and_go_on, str(tmp_path / "1"), case, 2, 6)
    run_ranks(2, load_train_save, str(tmp_path / "1"), str(tmp_path / "2"), case)
    (found,) = run_ranks(1, load_and_train, str(tmp_path / "2"), case, range(4, 6))
    expected = (expected[0][2:], *expected[1:])
    require_continued(found, expected, rtol=1e-5, atol=1e-5)


def load_train_save(source: str, destination: str, case: Case) -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(case[0], **case[1])
    loaded = dist_checkpointing.load(sharded_state(ddp, optimizer, True, None), source)
    ddp.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    train(ddp, optimizer, range(2, 4))
    dist_checkpointing.save(sharded_state(ddp, optimizer, False, None), destination)


@pytest.mark.parametrize("case", CASES[:2] + CASES[3:5], ids=str)
def test_names_and_shapes_of_sharded_state(case: Case) -> None:
    (names,) = run_ranks(1, state_names, case)
    wanted = ["exp_avg", "exp_avg_sq"]
    if case[0] != torch.float32 or case[1].get("sharded"):
        wanted.append("fp32_param")
    assert {name for name in names if name.endswith(".3.weight")} == {f"optimizer.state.{n}.3.weight" for n in wanted}
    assert all(
        dtype == torch.float32 and shape == (5, 37) for name, (dtype, shape) in names.items() if "3.weight" in name
    )


def state_names(case: Case) -> dict[str, Any]:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(case[0], **case[1])
    state = optimizer.sharded_state_dict(ddp.sharded_state_dict())
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {tensor.key: (tensor.dtype, tuple(tensor.global_shape)) for tensor in tensors}


# --- the `torch` format
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_plain_state_dict_resumes_bitwise(case: Case, tmp_path: Path) -> None:
    run_ranks(1, check_plain_state_dict, case, str(tmp_path / "state.pt"))


def check_plain_state_dict(case: Case, file: str) -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(case[0], **case[1])
    train(ddp, optimizer, range(3))
    torch.save([ddp.state_dict(), optimizer.state_dict()], file)
    expected = train(ddp, optimizer, range(3, 6)), weights(ddp), optimizer.get_loss_scale().item()
    other, other_optimizer = build(case[0], **case[1])
    model_state, optimizer_state = torch.load(file, weights_only=True)
    other.load_state_dict(model_state)
    other_optimizer.load_state_dict(optimizer_state)
    found = (
        train(other, other_optimizer, range(3, 6)),
        weights(other),
        other_optimizer.get_loss_scale().item(),
    )
    require_continued(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distrib_optim_file_resumes_bitwise(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    run_ranks(2, check_distrib_optim, dtype, legacy, str(tmp_path / "distrib_optim.pt"))


def check_distrib_optim(dtype: torch.dtype, legacy: bool, file: str) -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build(dtype, sharded=True)
    train(ddp, optimizer, range(3))
    optimizer.save_parameter_state(file)
    model_state = {name: value.clone() for name, value in ddp.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    torch.distributed.barrier()
    content = torch.load(file, weights_only=True)
    check_content(content, ddp, dtype)
    if legacy:
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            ((dtypes, entry),) = content[0].items()
            torch.save(
                {0: {torch.float32: {name: [entry[name]] for name in entry if name != "numel_unpadded"}}},
                file,
            )
    expected = train(ddp, optimizer, range(3, 6)), weights(ddp), 1.0
    other, other_optimizer = build(dtype, sharded=True)
    other.load_state_dict(model_state)
    other_optimizer.load_state_dict(optimizer_state)
    other_optimizer.load_parameter_state(file, update_legacy_format=legacy)
    require_continued((train(other, other_optimizer, range(3, 6)), weights(other), 1.0), expected, rtol=0, atol=0)


def check_content(content: dict[Any, Any], ddp: Any, dtype: torch.dtype) -> None:
    """Published structure, and parameters at the elements that the layout says."""
    assert content["buckets_coalesced"] is True and set(content) == {"buckets_coalesced", 0}
    entry = content[0][(dtype, torch.float32)]
    (buffer,) = ddp.param_and_grad_buffers
    assert set(entry) == {"param", "exp_avg", "exp_avg_sq", "numel_unpadded"}
    assert entry["numel_unpadded"] == buffer.numel_unpadded == entry["exp_avg"].numel()
    assert {entry[name].dtype for name in ("param", "exp_avg", "exp_avg_sq")} == {torch.float32}
    for param, (start, end) in zip(buffer.params, buffer.layout.spans):
        assert torch.equal(entry["param"][start:end].to(dtype).view_as(param), param.detach())


# --- bad input
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"), [("missing", "FileNotFoundError"), ("other size", "buffer 0 has 929 elements")]
)
def test_unreadable_parameter_state_fails_on_every_rank(damage: str, message: str, tmp_path: Path) -> None:
    for error in run_ranks(2, load_bad_parameter_state, damage, str(tmp_path / "distrib_optim.pt")):
        assert message in error


def load_bad_parameter_state(damage: str, file: str) -> str:
    parallel_state.initialize_model_parallel()
    _, optimizer = build(sharded=True)
    if damage == "other size":
        state = optimizer.get_parameter_state_dp_zero()
        if state is not None:
            state[0][(torch.float32, torch.float32)]["numel_unpadded"] -= 64
            torch.save(state, file)
    try:
        optimizer.load_parameter_state(file)
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"
    return "no error"


def test_state_of_another_model_is_refused() -> None:
    run_ranks(1, check_other_model)


def check_other_model() -> None:
    parallel_state.initialize_model_parallel()
    ddp, optimizer = build()
    train(ddp, optimizer, range(1))
    state = optimizer.state_dict()
    other = build()[1]
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="a parameter group has 2 parameters, 1 in the checkpoint"):
        other.load_state_dict(state)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(3,\) in the checkpoint"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="distrib_optim_sharding_type \\(dp_reshardable\\) must be one of"):
        sharded_ddp, sharded = build(sharded=True)
        sharded.sharded_state_dict(sharded_ddp.sharded_state_dict(), sharding_type="dp_reshardable")
