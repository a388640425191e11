"""Learning rate and weight decay as functions of the number of samples seen.

Warmup is linear. Decay is linear, cosine (arXiv:1608.03983), inverse-square-root (arXiv:1706.03762, section
5.3) or warmup-stable-decay (arXiv:2404.06395, section 4), all ending in the minimum.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

logger = logging.getLogger(__name__)

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
WD_INCR_STYLES = ("constant", "linear", "cosine")

# name in the state -> names that older checkpoints use for it
_ALIASES = {
    "max_lr": ("start_lr",),
    "lr_warmup_steps": ("warmup_iter", "warmup_steps"),
    "lr_decay_steps": ("end_iter", "decay_steps"),
    "lr_decay_style": ("decay_style",),
    "num_steps": ("num_iters",),
}
_COMPARED = (
    *("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style"),
    *("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style"),
)


def decay_coefficient(style: str, progress: float) -> float:
    """Share of (max_lr - min_lr) that is left after the share `progress` of a decay."""
    match style:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (math.cos(math.pi * progress) + 1.0)
        case "exponential":
            return 2.0 * 0.5**progress - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(progress)
    raise ValueError(f"decay style ({style}) must be one of {', '.join(WSD_DECAY_STYLES)}")


class OptimizerParamScheduler:
    """Writes `lr` and `weight_decay` into the optimizer's parameter groups; steps count samples.

    A group may have its own `max_lr` and `min_lr`, and multipliers `lr_mult` and `wd_mult`.

    Args:
        optimizer: whose `param_groups` are set, already at construction.
        init_lr: where warmup starts.
        lr_warmup_steps, lr_decay_steps: samples at which warmup and decay end.
        start_wd, end_wd: weight decay at the start and after `wd_incr_steps` samples.
        use_checkpoint_opt_param_scheduler: on load the checkpoint's values replace the ones given here.
        override_opt_param_scheduler: on load the ones given here stay; by default both must agree.
        wsd_decay_steps: samples of the final decay of style WSD.
        lr_wsd_decay_style: shape of that decay.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: int,
        lr_decay_steps: int,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool | None = True,
        override_opt_param_scheduler: bool | None = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.init_lr, self.max_lr, self.min_lr = init_lr, max_lr, min_lr
        self.lr_warmup_steps, self.lr_decay_steps, self.lr_decay_style = (
            lr_warmup_steps,
            lr_decay_steps,
            lr_decay_style,
        )
        self.wsd_decay_steps, self.lr_wsd_decay_style = wsd_decay_steps, lr_wsd_decay_style
        self.start_wd, self.end_wd = start_wd, end_wd
        self.wd_incr_steps, self.wd_incr_style = wd_incr_steps, wd_incr_style
        self.use_checkpoint_opt_param_scheduler = bool(use_checkpoint_opt_param_scheduler)
        self.override_opt_param_scheduler = bool(override_opt_param_scheduler)
        self._require_valid()
        self._given_lr_bounds: list[dict[str, Any]] = [
            {name: group[name] for name in ("max_lr", "min_lr") if name in group} for group in optimizer.param_groups
        ]
        self.num_steps = 0
        self.step(0)

    def _require_valid(self) -> None:
        if self.max_lr is None:
            raise ValueError("lr is not set; the schedule needs a peak learning rate")
        if not 0.0 <= self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr ({self.min_lr}) must lie between 0 and lr ({self.max_lr})")
        if self.init_lr > self.max_lr:
            raise ValueError(f"lr_warmup_init ({self.init_lr}) must not exceed lr ({self.max_lr})")
        if self.lr_decay_steps <= 0:
            raise ValueError(f"lr_decay_steps ({self.lr_decay_steps}) must be positive")
        if not 0 <= self.lr_warmup_steps < self.lr_decay_steps:
            raise ValueError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must be less than lr_decay_steps ({self.lr_decay_steps})"
            )
        if self.lr_decay_style not in LR_DECAY_STYLES:
            raise ValueError(f"lr_decay_style ({self.lr_decay_style}) must be one of {', '.join(LR_DECAY_STYLES)}")
        if self.lr_decay_style == "WSD":
            if self.wsd_decay_steps is None:
                raise ValueError(
                    "lr_decay_style WSD needs the length of its final decay (lr_wsd_decay_iters or _samples)"
                )
            if self.lr_wsd_decay_style not in WSD_DECAY_STYLES:
                raise ValueError(
                    f"lr_wsd_decay_style ({self.lr_wsd_decay_style}) must be one of {', '.join(WSD_DECAY_STYLES)}"
                )
        if not 0.0 <= self.start_wd <= self.end_wd:
            raise ValueError(f"start_weight_decay ({self.start_wd}) must lie between 0 and end ({self.end_wd})")
        if self.wd_incr_style not in WD_INCR_STYLES:
            raise ValueError(
                f"weight_decay_incr_style ({self.wd_incr_style}) must be one of {', '.join(WD_INCR_STYLES)}"
            )
        if self.wd_incr_style == "constant" and self.start_wd != self.end_wd:
            raise ValueError(f"a constant weight decay cannot go from {self.start_wd} to {self.end_wd}")
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise ValueError("override_opt_param_scheduler and use_checkpoint_opt_param_scheduler exclude each other")

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of a group after `num_steps` samples, without its `lr_mult`."""
        max_lr = _own_or(param_group, "max_lr", self.max_lr)
        min_lr = _own_or(param_group, "min_lr", self.min_lr)
        n, warmup = self.num_steps, self.lr_warmup_steps
        if warmup > 0 and n <= warmup:
            return self.init_lr + (max_lr - self.init_lr) * n / warmup
        if self.lr_decay_style == "constant":
            return max_lr
        if n > self.lr_decay_steps:
            return min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(min_lr, max_lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1)))
        return min_lr + self._coefficient(n) * (max_lr - min_lr)

    def _coefficient(self, n: int) -> float:
        if self.lr_decay_style != "WSD":
            return decay_coefficient(self.lr_decay_style, (n - self.lr_warmup_steps) / self._decay_length())
        assert self.wsd_decay_steps is not None and self.lr_wsd_decay_style is not None
        start = self.lr_decay_steps - self.wsd_decay_steps
        return 1.0 if n <= start else decay_coefficient(self.lr_wsd_decay_style, (n - start) / self.wsd_decay_steps)

    def _decay_length(self) -> int:
        return self.lr_decay_steps - self.lr_warmup_steps

    def get_wd(self) -> float:
        """Weight decay after `num_steps` samples, without a group's `wd_mult`."""
        if self.num_steps > self.wd_incr_steps or self.wd_incr_style == "constant":
            return self.end_wd
        progress = self.num_steps / self.wd_incr_steps if self.wd_incr_steps else 1.0
        if self.wd_incr_style == "cosine":
            progress = 0.5 * (math.cos(math.pi * (1.0 - progress)) + 1.0)
        return self.start_wd + progress * (self.end_wd - self.start_wd)

    def step(self, increment: int) -> None:
        """Count `increment` more samples and set the groups for the next step of the optimizer."""
        self.num_steps += increment
        weight_decay = self.get_wd()
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(group) * group.get("lr_mult", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The schedule and how far it has got."""
        return {name: getattr(self, name) for name in (*_COMPARED, "num_steps")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a schedule, with the optimizer's groups loaded already.

        Raises:
            ValueError: the schedules differ and none of the two options says which one counts.
        """
        saved = {name: _under_any_name(state_dict, name) for name in (*_COMPARED, "num_steps")}
        for name in _COMPARED:
            if saved[name] is not None:
                setattr(self, name, self._resolve(name, getattr(self, name), saved[name]))
        for group, given in zip(self.optimizer.param_groups, self._given_lr_bounds):
            if self.override_opt_param_scheduler:
                group.update(given)
            elif not group.get("is_decoupled_lr", False):
                group.update({name: getattr(self, name) for name in given})
        if saved["num_steps"] is None:
            raise ValueError(f"the scheduler state to load has no num_steps, only {list(state_dict)}")
        self.num_steps = 0
        self.step(saved["num_steps"])

    def _resolve(self, name: str, own: Any, saved: Any) -> Any:
        if self.override_opt_param_scheduler:
            if own != saved:
                logger.info("%s: %s overrides %s of the checkpoint", name, own, saved)
            return own
        if not self.use_checkpoint_opt_param_scheduler and own != saved:
            raise ValueError(
                f"{name} is {own}, but {saved} in the checkpoint; set --override-opt_param-scheduler "
                f"(override_opt_param_scheduler) to keep {own} or --use-checkpoint-opt_param-scheduler "
                f"(use_checkpoint_opt_param_scheduler) to take {saved}"
            )
        return saved


def _own_or(param_group: dict[str, Any], name: str, default: float) -> float:
    value = param_group.get(name)
    return default if value is None else value


def _under_any_name(state_dict: dict[str, Any], name: str) -> Any:
    for spelling in (name, *_ALIASES.get(name, ())):
        if spelling in state_dict:
            return state_dict[spelling]
    return None
