from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

GOLD = {"init_lr": 1e-7, "max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 100, "lr_decay_steps": 1000}
DEFAULTS = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 1000, "wd_incr_style": "constant"}
FROM_FLAGS = {"use_checkpoint_opt_param_scheduler": False}


def scheduler(groups: list[dict[str, Any]] | None = None, **changes: Any) -> OptimizerParamScheduler:
    optimizer = SimpleNamespace(param_groups=[{}] if groups is None else groups)
    return OptimizerParamScheduler(optimizer, **{**GOLD, "lr_decay_style": "linear", **DEFAULTS, **changes})


def at(steps: int, **changes: Any) -> dict[str, Any]:
    groups: list[dict[str, Any]] = [{}]
    scheduler(groups, **changes).step(steps)
    return groups[0]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [1e-07, 5.000500e-04, 1e-03, 9.989000e-04, 5.050000e-04, 1e-05, 1e-05]),
        ("cosine", [1e-07, 5.000500e-04, 1e-03, 9.999970e-04, 5.050000e-04, 1e-05, 1e-05]),
        (
            "inverse-square-root",
            [1e-07, 5.000500e-04, 1e-03, 9.950372e-04, 4.264014e-04, 3.162278e-04, 1e-05],
        ),
        ("constant", [1e-07, 5.000500e-04, 1e-03, 1e-03, 1e-03, 1e-03, 1e-03]),
    ],
)
def test_learning_rate(style: str, expected: list[float]) -> None:
    found = [at(n, lr_decay_style=style)["lr"] for n in (0, 50, 100, 101, 550, 1000, 1001)]
    assert found == pytest.approx(expected, rel=5e-7)  # the expected values have seven digits


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [9.950500e-04, 5.050000e-04, 1.495000e-05, 1e-05]),
        ("cosine", [9.999389e-04, 5.050000e-04, 1.006107e-05, 1e-05]),
        ("exponential", [9.931497e-04, 4.200714e-04, 1.343703e-05, 1e-05]),
        ("minus_sqrt", [9.299964e-04, 2.999643e-04, 1.247810e-05, 1e-05]),
    ],
)
def test_warmup_stable_decay(style: str, expected: list[float]) -> None:
    settings = {"lr_decay_style": "WSD", "wsd_decay_steps": 200, "lr_wsd_decay_style": style}
    assert at(800, **settings)["lr"] == 1e-3
    assert [at(n, **settings)["lr"] for n in (801, 900, 999, 1000)] == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize(
    ("style", "expected"), [("linear", [3.25e-02, 5.5e-02, 0.1]), ("cosine", [2.318019e-02, 5.5e-02, 0.1])]
)
def test_weight_decay(style: str, expected: list[float]) -> None:
    ramp = {"start_wd": 0.01, "end_wd": 0.1, "wd_incr_steps": 1000, "wd_incr_style": style}
    found = [at(n, **ramp)["weight_decay"] for n in (250, 500, 1001)]
    assert found == pytest.approx(expected, rel=5e-7)


def test_construction_sets_the_first_step_and_steps_add_up() -> None:
    groups: list[dict[str, Any]] = [{}]
    schedule = scheduler(groups)
    assert groups[0]["lr"] == 1e-7
    schedule.step(30)
    schedule.step(20)
    assert schedule.num_steps == 50 and groups[0]["lr"] == at(50)["lr"]


def test_multipliers_and_own_bounds_of_groups() -> None:
    groups = [
        {"lr_mult": 0.5, "wd_mult": 0.0},
        {"max_lr": 2e-3, "min_lr": 0.0},
        {"max_lr": None, "min_lr": None},
    ]
    scheduler(groups).step(550)
    assert [group["lr"] for group in groups] == pytest.approx([5.05e-4 / 2, 1e-3, 5.05e-4])
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_lr": 1.0}, r"min_lr \(1.0\) must lie between 0 and lr"),
        ({"init_lr": 1.0}, "lr_warmup_init"),
        ({"lr_decay_steps": 0}, r"lr_decay_steps \(0\) must be positive"),
        ({"lr_warmup_steps": 1000}, r"lr_warmup_steps \(1000\) must be less than lr_decay_steps \(1000\)"),
        ({"lr_decay_style": "sine"}, r"lr_decay_style \(sine\) must be one of constant"),
        ({"lr_decay_style": "WSD"}, "needs the length of its final decay"),
        ({"lr_decay_style": "WSD", "wsd_decay_steps": 9}, r"lr_wsd_decay_style \(None\)"),
        ({"start_wd": 0.2}, "start_weight_decay"),
        ({"end_wd": 0.2}, "constant weight decay cannot go from 0.1 to 0.2"),
        ({"wd_incr_style": "cubic"}, "weight_decay_incr_style"),
        ({"override_opt_param_scheduler": True}, "exclude each other"),
        ({"max_lr": None}, "lr is not set"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler(**changes)


def test_resumed_schedule_continues() -> None:
    first = scheduler()
    first.step(437)
    groups: list[dict[str, Any]] = [{}]
    scheduler(groups, **FROM_FLAGS).load_state_dict(first.state_dict())
    assert groups[0]["lr"] == at(437)["lr"]


def test_state_has_the_published_names() -> None:
    assert set(scheduler().state_dict()) == {
        *("max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr"),
        *("start_wd", "end_wd", "wd_incr_style", "wd_incr_steps"),
    }


def test_old_names_in_a_checkpoint() -> None:
    new = scheduler(max_lr=2e-3)
    new.step(500)
    old_names = {"max_lr": "start_lr", "lr_warmup_steps": "warmup_iter", "lr_decay_steps": "end_iter"}
    old_names |= {"lr_decay_style": "decay_style", "num_steps": "num_iters"}
    old = {old_names.get(name, name): value for name, value in new.state_dict().items()}
    loaded = scheduler()
    loaded.load_state_dict(old)
    assert loaded.state_dict() == new.state_dict()


def test_a_schedule_that_differs_from_the_checkpoint() -> None:
    saved = scheduler(max_lr=2e-3)
    saved.step(550)

    def load(**choice: bool) -> tuple[float, float]:
        groups = [{"max_lr": 1e-3, "min_lr": 1e-5}, {"max_lr": 5e-3, "min_lr": 1e-5, "is_decoupled_lr": True}]
        schedule = scheduler(groups, **choice)
        groups[0]["max_lr"], groups[1]["max_lr"] = 2e-3, 6e-3  # what loading the optimizer brings in first
        schedule.load_state_dict(saved.state_dict())
        return schedule.max_lr, groups[0]["max_lr"], groups[1]["max_lr"]

    with pytest.raises(ValueError, match="max_lr is 0.001, but 0.002 in the checkpoint; set --override-opt_param"):
        load(use_checkpoint_opt_param_scheduler=False)
    assert load(use_checkpoint_opt_param_scheduler=True) == (2e-3, 2e-3, 6e-3)
    kept = load(use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True)
    assert kept == (1e-3, 1e-3, 5e-3)
