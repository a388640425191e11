"""Groups with communicators of their own: which are made, and what is refused where NCCL is missing."""

import datetime
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import communicators, parallel_state
from megatron.core.communicators import Communicator, plan_communicators, read_nccl_settings
from megatron.core.process_groups_config import ProcessGroupCollection
from tests.worker_pool import run_ranks

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without NCCL")


def test_every_public_name_stands_for_a_group() -> None:
    assert set(communicators.GROUP_NAMES.values()) == set(ProcessGroupCollection.__dataclass_fields__)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "nccl.yaml"
    path.write_text(text)
    return path


def test_settings_are_read_from_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, "dp_cp:\n  min_ctas: 2\n  max_ctas: 8\nep_dp: {cga_cluster_size: 0, net_name: ib}\n")
    assert read_nccl_settings(path) == {
        "dp_cp": (("min_ctas", 2), ("max_ctas", 8)),
        "ep_dp": (("cga_cluster_size", 0), ("net_name", "IB")),
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 3", "must hold settings for each group"),
        ("dp_cp: 3", "must hold settings for each group"),
        ("everything: {max_ctas: 3}", "no process group 'everything'; there are dp_cp"),
        ("dp: {threads: 3}", "dp has no setting threads; there are min_ctas, max_ctas"),
        ("dp: {max_ctas: many}", r"max_ctas of dp \(many\) must be a whole number"),
        ("dp: {max_ctas: 0}", r"max_ctas of dp \(0\) must be a whole number, and positive"),
        ("dp: {net_name: token ring}", "must be IB or socket"),
        ("dp: {min_ctas: 9, max_ctas: 3}", r"min_ctas of dp \(9\) must not exceed max_ctas \(3\)"),
    ],
)
def test_unusable_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_nccl_settings(written(tmp_path, text))


@needs_cpu
@pytest.mark.parametrize(
    "asked, message",
    [
        ({"pipeline_backend": "nccl"}, "pp: nccl needs CUDA devices, found cpu; use gloo"),
        ({"high_priority_groups": ["ep_dp"]}, "expt_dp: priorities of streams .* found gloo; leave them out"),
        ({"high_priority_groups": ["all"]}, "no process group 'all'"),
    ],
    ids=str,
)
def test_what_this_machine_cannot_make_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_communicators(**asked)


def test_missing_ucc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_ucc_available", lambda: False)
    with pytest.raises(ValueError, match="this build of torch has no UCC"):
        plan_communicators("ucc")


def test_network_reduction_is_kept_to_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """That group's communicator is made before the others may not."""
    seen: list[Any] = []
    monkeypatch.setenv("NCCL_COLLNET_ENABLE", "1")
    monkeypatch.setattr(dist, "barrier", lambda group: seen.append((group, os.environ["NCCL_COLLNET_ENABLE"])))
    communicators.keep_network_reduction_to("dp_cp")  # type: ignore[arg-type]
    assert seen == [("dp_cp", "1")] and os.environ["NCCL_COLLNET_ENABLE"] == "0"


class _Options:
    """Stands for `ProcessGroupNCCL.Options`, which only builds for CUDA have."""

    def __init__(self, is_high_priority_stream: bool) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace()
        self._timeout: Any = None


def test_arguments_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(communicators.device, "device_type", lambda: "cuda")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=_Options), raising=False)
    path = written(tmp_path, "pp: {max_ctas: 4}")
    plan = plan_communicators("nccl", path, ["pp", "tp"])
    assert plan == {
        "pp": Communicator("nccl", True, (("max_ctas", 4),)),
        "tp": Communicator(high_priority=True),
    }
    timeout = datetime.timedelta(minutes=7)
    found = plan["pp"].arguments(timeout)
    assert found["backend"] == "cpu:gloo,cuda:nccl"
    assert found["pg_options"].is_high_priority_stream and found["pg_options"]._timeout == timeout
    assert vars(found["pg_options"].config) == {"max_ctas": 4}
    assert "backend" not in plan["tp"].arguments(timeout)
    assert Communicator().arguments(timeout) == {}


def pipeline_over_gloo() -> tuple[bool, str, float]:
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, pipeline_model_parallel_comm_backend="gloo"
    )
    groups = parallel_state.get_process_groups()
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=groups.pp)
    return groups.pp is groups.mp, dist.get_backend(groups.pp), float(total)


def test_pipeline_groups_have_a_communicator_of_their_own() -> None:
    """Also where other groups have the same members, which share one otherwise."""
    assert run_ranks(2, pipeline_over_gloo) == [(False, "gloo", 1.0)] * 2
