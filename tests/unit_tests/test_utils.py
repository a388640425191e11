"""The small helpers of `megatron.core.utils`."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import parallel_state, utils
from tests.worker_pool import run_ranks


def test_exact_division() -> None:
    assert utils.divide(12, 4) == 3
    with pytest.raises(ValueError, match="13 is not divisible by 4"):
        utils.divide(13, 4)


@pytest.mark.parametrize(("value", "multiple", "rounded"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)])
def test_rounding_up(value: int, multiple: int, rounded: int) -> None:
    assert utils.round_up(value, multiple) == rounded


# --- process groups ---


def sizes_and_ranks() -> tuple[int, int]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    assert utils.get_tensor_model_parallel_group_if_none(None) is group
    assert utils.get_tensor_model_parallel_group_if_none(dist.group.WORLD) is dist.group.WORLD
    return utils.get_pg_size(group), utils.get_pg_rank(group)


def test_groups_and_their_absence() -> None:
    assert utils.get_pg_size(None) == 1
    assert utils.get_pg_rank(None) == 0
    assert utils.get_tensor_model_parallel_group_if_none(None) is None
    assert run_ranks(4, sizes_and_ranks) == [(2, 0), (2, 1), (2, 0), (2, 1)]


def experts_have_their_own_group() -> bool:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    group = utils.get_tensor_model_parallel_group_if_none(None, is_expert=True)
    return group is parallel_state.get_expert_tensor_parallel_group() and utils.get_pg_size(group) == 1


def test_experts_have_a_tensor_group_of_their_own() -> None:
    assert run_ranks(2, experts_have_their_own_group) == [True, True]


# --- initialisers ---


def test_initialisers() -> None:
    torch.manual_seed(0)
    drawn = utils.init_method_normal(0.5)(torch.empty(400, 400))
    torch.manual_seed(0)
    assert torch.equal(utils.scaled_init_method_normal(2.0, num_layers=8)(torch.empty(400, 400)), drawn)
    torch.manual_seed(0)
    assert torch.equal(utils.scaled_init_method_normal(1.0, 4, multiplier=1.0)(torch.empty(400, 400)), drawn)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.01)
    assert repr(utils.init_method_normal(0.02)) == "normal(std=0.02)"


# --- modules ---


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, **attributes: object) -> None:
        super().__init__()
        self.module = module
        for name, value in attributes.items():
            setattr(self, name, value)


def wrapped() -> tuple[nn.Module, Wrapper]:
    bare = nn.Linear(2, 2)
    bare.config, bare.inner = "the config", "deep"  # type: ignore[assignment]
    return bare, Wrapper(Wrapper(bare, config=None), outer="shallow")


def test_attributes_of_wrapped_models() -> None:
    bare, model = wrapped()
    assert utils.get_attr_wrapped_model(model, "inner") == "deep"
    assert utils.get_attr_wrapped_model(model, "outer") == "shallow"
    assert utils.get_attr_wrapped_model(model, "inner", return_model_obj=True) is bare
    assert utils.get_attr_wrapped_model(model, "config") is None  # the nearest wrapper has one
    assert utils.get_attr_wrapped_model(model, "config", allow_none=False) == "the config"
    assert utils.get_model_config(model) == "the config"
    with pytest.raises(RuntimeError, match="Wrapper and the models it wraps have no attribute 'missing'"):
        utils.get_attr_wrapped_model(model, "missing")
    with pytest.raises(RuntimeError, match="not a list of chunks"):
        utils.get_attr_wrapped_model([model], "inner")


def test_unwrapping() -> None:
    bare, model = wrapped()
    assert utils.unwrap_model(model) is bare
    assert utils.unwrap_model([model, bare]) == [bare, bare]
    model.is_wrapper = False  # a model that has a submodule of this name
    assert utils.unwrap_model(model) is model


def test_a_tensor_that_is_no_view_is_returned_as_it_is() -> None:
    own = torch.zeros(3)
    assert utils.make_viewless_tensor(own, requires_grad=True, keep_graph=True) is own


@pytest.mark.parametrize("keep_graph", [True, False])
def test_views_become_tensors_of_their_own(keep_graph: bool) -> None:
    base = torch.arange(6.0, requires_grad=True)
    view = (base * 2)[2:5]
    viewless = utils.make_viewless_tensor(view, requires_grad=True, keep_graph=keep_graph)
    assert view._base is not None
    assert viewless._base is None
    assert viewless.requires_grad
    assert viewless.data_ptr() == view.data_ptr()
    (viewless * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    if keep_graph:
        assert base.grad.tolist() == [0.0, 0.0, 2.0, 20.0, 200.0, 0.0]
    else:
        assert base.grad is None
        assert viewless.grad.tolist() == [1.0, 10.0, 100.0]


# --- checkpoints ---


def describe(tensor: Tensor) -> list[tuple[object, ...]]:
    """tp 2 × dp 2: where this rank's tensor lies in the global one, and which copy of it this is."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    stacked = ((0, 3, 5),)  # layer 3 of 5
    described = [
        utils.make_tp_sharded_tensor_for_checkpoint(tensor, "w"),
        utils.make_tp_sharded_tensor_for_checkpoint(tensor, "w", 1, prepend_offsets=stacked),
        utils.make_tp_sharded_tensor_for_checkpoint(tensor, "w", replica_id=(7, 8, 9)),
        utils.make_sharded_tensor_for_checkpoint(tensor, "w"),
        utils.make_sharded_tensor_for_checkpoint(tensor, "w", stacked, allow_shape_mismatch=True),
    ]
    assert [s.allow_shape_mismatch for s in described] == [False] * 4 + [True]
    return [(s.key, s.global_shape, s.global_offset, s.replica_id) for s in described]


def test_places_of_tensors_in_checkpoints() -> None:
    for rank, described in enumerate(run_ranks(4, describe, torch.zeros(4, 6))):
        tp, dp = rank % 2, rank // 2
        assert described == [
            ("w", (8, 6), (4 * tp, 0), (0, 0, dp)),
            ("w", (5, 4, 12), (3, 0, 6 * tp), (0, 0, dp)),
            ("w", (8, 6), (4 * tp, 0), (7, 8, 9)),
            ("w", (4, 6), (0, 0), (0, tp, dp)),
            ("w", (5, 4, 6), (3, 0, 0), (0, tp, dp)),
        ]


def test_places_without_process_groups() -> None:
    described = utils.make_tp_sharded_tensor_for_checkpoint(torch.zeros(4, 6), "w")
    assert (described.global_shape, described.replica_id) == ((4, 6), (0, 0, 0))


# --- batches ---


def part_of_batch(length: int) -> dict[str, Tensor | None]:
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    positions = torch.arange(length)
    batch = {
        "tokens": positions.expand(2, length),
        "hidden": torch.stack([positions, -positions], -1)[None],  # [b, s, h]
        "attention_mask": (positions[:, None] * 100 + positions)[None, None],
        "labels": None,
    }
    return utils.get_batch_on_this_cp_rank(batch)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_context_ranks_take_an_early_and_a_late_part(ranks: int) -> None:
    """Rank c of n has chunks c and 2n - 1 - c of 2n: all have the same share of the causal triangle."""
    length = 16
    chunk = length // (2 * ranks)
    seen: list[int] = []
    for rank, batch in enumerate(run_ranks(ranks, part_of_batch, length)):
        late = 2 * ranks - 1 - rank
        own = [*range(rank * chunk, (rank + 1) * chunk), *range(late * chunk, (late + 1) * chunk)]
        assert batch["labels"] is None
        assert batch["tokens"].tolist() == [own, own]
        assert batch["hidden"].tolist() == [[[i, -i] for i in own]]
        assert batch["attention_mask"].tolist() == [[[[i * 100 + j for j in range(length)] for i in own]]]
        assert sum(own) == length * (length - 1) // 2 // ranks
        seen += own
    assert sorted(seen) == list(range(length))


def refused_length() -> None:
    with pytest.raises(ValueError, match="14 is not divisible by 4"):
        part_of_batch(14)


def test_lengths_that_do_not_divide_are_refused() -> None:
    run_ranks(2, refused_length)


# --- the rest ---


def messages_of_rank() -> list[str]:
    records: list[str] = []
    logger = logging.Logger("test")
    logger.addHandler(SimpleNamespace(level=0, handle=lambda record: records.append(record.getMessage())))
    utils.log_single_rank(logger, logging.INFO, "from %s", "the first")
    utils.log_single_rank(logger, logging.INFO, "from the second", rank=1)
    return records


def test_logging_on_one_rank() -> None:
    assert run_ranks(2, messages_of_rank) == [["from the first"], ["from the second"]]
    assert messages_of_rank() == ["from the first", "from the second"]  # a single process is every rank


@pytest.mark.parametrize(
    ("found", "wanted", "at_least", "newer"),
    [
        ("2.6.0", "2.6", True, False),
        ("2.6", "2.6.0", True, False),
        ("2.13.0+cpu", "2.6.1", True, True),
        ("2.6.0a0+git12", "2.6.0", True, False),
        ("2.5.9", "2.6", False, False),
        ("10.0", "9.9.9", True, True),
        ("2.6.1.post2", "2.6.1", True, False),
        (None, "0.1", False, False),
    ],
)
def test_comparing_versions(found: str | None, wanted: str, at_least: bool, newer: bool) -> None:
    assert utils._at_least(found, wanted, check_equality=True) == at_least
    assert utils._at_least(found, wanted, check_equality=False) == newer


def test_versions_of_installed_packages() -> None:
    assert utils.is_torch_min_version("2.6.0")
    assert not utils.is_torch_min_version("99.0")
    assert utils._installed_version("no-such-distribution") is None
    if utils.get_te_version() is None:
        assert not utils.is_te_min_version("0.1")


def test_reused_buffers() -> None:
    buffers = utils.GlobalMemoryBuffer()
    first = buffers.get_tensor((2, 3), torch.float32, "gathered")
    smaller = buffers.get_tensor((5,), torch.float32, "gathered")
    assert first.shape == (2, 3)
    assert smaller.shape == (5,)
    assert smaller.data_ptr() == first.data_ptr()
    assert buffers.get_tensor((7,), torch.float32, "gathered").numel() == 7  # grows
    others = [((5,), torch.float32, "other"), ((5,), torch.bfloat16, "gathered")]
    pointers = {buffers.get_tensor(*other).data_ptr() for other in others}
    assert len(pointers | {buffers.get_tensor((5,), torch.float32, "gathered").data_ptr()}) == 3


def replicas_agree(changed: str | None, cross_check: bool) -> bool:
    parallel_state.initialize_model_parallel()
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, 2).t())
    model.rounded = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    model.scalar = nn.Parameter(torch.zeros(()))
    if changed and dist.get_rank() == 1:
        with torch.no_grad():
            getattr(model, changed).view(-1)[-1:] += 2**-20 if changed == "rounded" else 1e-30
    return utils.check_param_hashes_across_dp_replicas([model], cross_check=cross_check)


def test_replicas_are_compared_bitwise() -> None:
    assert run_ranks(2, replicas_agree, None, True) == [True, True]
    for changed in ("rounded", "scalar"):
        assert run_ranks(2, replicas_agree, changed, True) == [False, False]
    assert run_ranks(2, replicas_agree, "scalar", False) == [False, True]
