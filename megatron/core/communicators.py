"""What single process groups ask of their communicators: a backend, a priority, settings of NCCL.

A program names groups by their public short names; `GROUP_NAMES` has the fields of `ProcessGroupCollection` that they
stand for.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import device

GROUP_NAMES: dict[str, str] = {
    **{name: name for name in ("dp_cp", "intra_dp_cp", "dp", "cp", "hcp", "mp", "tp", "pp", "embd", "pos_embd")},
    **{name: name for name in ("tp_dp_cp", "tp_dp", "tp_cp", "ep", "tp_ep_pp")},
    "ep_tp": "expt_tp",
    "tp_ep_mp": "tp_ep",
    "ep_dp": "expt_dp",
    "intra_ep_dp": "intra_expt_dp",
    "inter_ep_dp": "inter_dist_opt",
    "intra_dist_opt_instance": "intra_dist_opt",
}
"""Public name -> field of `ProcessGroupCollection`; `hcp` stands for all levels."""

NETWORKS = {"ib": "IB", "socket": "Socket"}
NCCL_SETTINGS = ("min_ctas", "max_ctas", "cga_cluster_size", "net_name")


@dataclass(frozen=True)
class Communicator:
    """What a group's communicator is made with. Groups of the same ranks share one where they ask the same."""

    backend: str | None = None
    """nccl, gloo or ucc; None is the one of the world."""
    high_priority: bool = False
    """Its kernels go before those of others (a CUDA stream of high priority)."""
    nccl: tuple[tuple[str, int | str], ...] = ()
    """Fields of NCCL's configuration."""

    @property
    def needs_nccl(self) -> bool:
        """Whether only NCCL can give it."""
        return self.high_priority or bool(self.nccl)

    def arguments(self, timeout: datetime.timedelta) -> dict[str, Any]:
        """Of `torch.distributed.new_group`."""
        found: dict[str, Any] = {}
        if self.backend is not None:
            kind = device.device_type()
            found["backend"] = self.backend if kind == "cpu" else f"cpu:gloo,{kind}:{self.backend}"
        if self.needs_nccl:
            found["pg_options"] = self._nccl_options(timeout)
        return found

    def _nccl_options(self, timeout: datetime.timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=self.high_priority)
        options._timeout = timeout
        for name, value in self.nccl:
            setattr(options.config, name, value)
        return options


DEFAULT = Communicator()


def plan_communicators(
    pipeline_backend: str | None = None,
    config_path: str | Path | None = None,
    high_priority_groups: Iterable[str] = (),
) -> dict[str, Communicator]:
    """Field of `ProcessGroupCollection` -> what its communicators are made with; the others are ordinary.

    Args:
        pipeline_backend: of the pipeline groups.
        config_path: YAML file {group: {min_ctas, max_ctas, cga_cluster_size, net_name}}.
        high_priority_groups: public names of groups.

    Raises:
        ValueError: a group or a setting is unknown, or this process's backend cannot give it.
    """
    plan: dict[str, Communicator] = {}
    for name, settings in (read_nccl_settings(config_path) if config_path else {}).items():
        plan[_field(name)] = Communicator(nccl=settings)
    for name in high_priority_groups:
        plan[_field(name)] = replace(plan.get(_field(name), DEFAULT), high_priority=True)
    if pipeline_backend is not None:
        plan["pp"] = replace(plan.get("pp", DEFAULT), backend=pipeline_backend)
    for name, communicator in plan.items():
        why = why_unavailable(communicator)
        if why is not None:
            raise ValueError(f"the communicators of {name}: {why}")
    return plan


def why_unavailable(communicator: Communicator) -> str | None:
    """Why this process cannot make such a communicator; None if it can."""
    backend = communicator.backend
    if backend == "ucc" and not dist.is_ucc_available():
        return "this build of torch has no UCC backend; leave it to the backend of the world"
    if backend == "nccl" and not _has_nccl():
        return f"nccl needs CUDA devices, found {device.device_type()}; use gloo"
    if communicator.needs_nccl and not (_has_nccl() and backend in (None, "nccl")):
        return (
            "priorities of streams and settings of NCCL need NCCL as the backend, found "
            f"{backend or device.communication_backend()}; leave them out"
        )
    return None


def keep_network_reduction_to(group: ProcessGroup) -> None:
    """Let the switches of the network reduce for `group`, and for no other: they have room for few communicators.

    NCCL makes a communicator in its first collective, as its environment says then. Collective over `group`.
    """
    dist.barrier(group)
    os.environ["NCCL_COLLNET_ENABLE"] = "0"


def require_network_reduction() -> None:
    """Only NCCL knows of switches that reduce.

    Raises:
        ValueError: this process does not use NCCL.
    """
    if not _has_nccl():
        raise ValueError(
            f"use_sharp needs NCCL on a network that reduces (SHARP), found {device.communication_backend()}; "
            "leave it out"
        )


def _has_nccl() -> bool:
    return device.device_type() == "cuda" and dist.is_nccl_available()


def read_nccl_settings(path: str | Path) -> dict[str, tuple[tuple[str, int | str], ...]]:
    """Public name of a group -> fields of NCCL's configuration, from a YAML file.

    Raises:
        ValueError: the file is not of this form, names an unknown group or setting, or a value cannot be.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path} is read with the package pyyaml, which is missing (pip install pyyaml)") from error

    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, Mapping) or not all(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(f"{path} must hold settings for each group, as in `dp_cp: {{max_ctas: 8}}`")
    for name in content:
        _field(name)
    return {name: tuple(_checked(path, name, settings)) for name, settings in content.items()}


def _checked(path: str | Path, group: str, settings: Mapping[str, Any]) -> Iterable[tuple[str, int | str]]:
    for name, value in settings.items():
        if name not in NCCL_SETTINGS:
            raise ValueError(f"{path}: {group} has no setting {name}; there are {', '.join(NCCL_SETTINGS)}")
        if name == "net_name":
            if str(value).lower() not in NETWORKS:
                raise ValueError(f"{path}: net_name of {group} ({value}) must be IB or socket")
            yield name, NETWORKS[str(value).lower()]
        elif isinstance(value, bool) or not isinstance(value, int) or value < (name != "cga_cluster_size"):
            raise ValueError(f"{path}: {name} of {group} ({value}) must be a whole number, and positive")
        else:
            yield name, value
    if settings.get("min_ctas", 1) > settings.get("max_ctas", settings.get("min_ctas", 1)):
        raise ValueError(
            f"{path}: min_ctas of {group} ({settings['min_ctas']}) must not exceed max_ctas ({settings['max_ctas']})"
        )


def _field(name: str) -> str:
    if name not in GROUP_NAMES:
        raise ValueError(f"there is no process group {name!r}; there are {', '.join(GROUP_NAMES)}")
    return GROUP_NAMES[name]
