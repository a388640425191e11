"""Overlapped reduction of gradients and gathering of weights: the numbers of the plain way, at other times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.bucket_group import Weights, _ParamAndGradBucketGroup
from tests.unit_tests.distributed.stack import LAYERS, Stack, backward, batch, optimizer_of, owned_grads, train, wrap
from tests.worker_pool import RankFailure, run_ranks

# --- gradients ---


@pytest.mark.parametrize(
    "ddp",
    [
        {},
        {"average_in_collective": True},
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "average_in_collective": True, "pad_buckets_for_high_nccl_busbw": True},
        {"per_token": True, "use_distributed_optimizer": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "grad_reduce_in_fp32": True, "use_distributed_optimizer": True},
    ],
    ids=lambda ddp: "-".join(ddp) or "plain",
)
def test_overlapped_reduction_gives_the_bits_of_the_plain_one(ddp: dict[str, Any]) -> None:
    run_ranks(2, check_same_gradients, ddp)


def check_same_gradients(ddp: dict[str, Any]) -> None:
    parallel_state.initialize_model_parallel()
    dtype = ddp.pop("dtype", torch.float32)
    plain = wrap(Stack(dtype), **ddp)
    plain.bucket_size = None
    early = wrap(Stack(dtype), overlap_grad_reduce=True, **ddp)
    assert len(early.bucket_groups) == LAYERS
    same_buckets = wrap(Stack(dtype), overlap_grad_reduce=True, **ddp)  # not overlapped, in the same buckets
    same_buckets.grad_reducer.overlap = False
    for step in range(3):
        for one in (plain, early, same_buckets):
            backward(one, step)
            one.finish_grad_sync()
        torch.testing.assert_close(owned_grads(early), owned_grads(same_buckets), rtol=0, atol=0)
        if not early.ddp_config.use_distributed_optimizer:
            grads, expected = ([p.main_grad for p in one.module.parameters()] for one in (early, plain))
            torch.testing.assert_close(grads, expected, rtol=0, atol=0)


def test_buckets_are_launched_while_earlier_layers_still_run_backward() -> None:
    for events in run_ranks(2, launches_among_backwards):
        first, second = events
        # The first step learns in how many parts each gradient comes.
        assert first == [*(f"backward {i}" for i in (3, 2, 1, 0)), *(f"launch {i}" for i in (3, 2, 1, 0))]
        assert second == [f"{what} {i}" for i in (3, 2, 1, 0) for what in ("backward", "launch")]


def launches_among_backwards() -> list[list[str]]:
    parallel_state.initialize_model_parallel()
    model = Stack()
    ddp = wrap(model, overlap_grad_reduce=True)
    events: list[str] = []
    names = {param: name for name, param in model.named_parameters()}
    for i, layer in enumerate(model.layers):
        layer.register_full_backward_pre_hook(lambda *unused, i=i: events.append(f"backward {i}"))
    original = _ParamAndGradBucketGroup.start_grad_sync

    def noted(group: _ParamAndGradBucketGroup) -> None:
        events.append(f"launch {names[group.buckets[0].params[-1]].split('.')[1]}")
        original(group)

    _ParamAndGradBucketGroup.start_grad_sync = noted  # type: ignore[method-assign]
    try:
        steps = []
        for step in range(2):
            events.clear()
            backward(ddp, step, microbatches=1)
            ddp.finish_grad_sync()
            steps.append(list(events))
        return steps
    finally:
        _ParamAndGradBucketGroup.start_grad_sync = original  # type: ignore[method-assign]


@pytest.mark.parametrize("variant", ["tied", "recompute", "tied-recompute"])
def test_gradients_that_come_in_parts_are_complete_before_they_leave(variant: str) -> None:
    run_ranks(2, check_gradients_in_parts, variant)


def check_gradients_in_parts(variant: str) -> None:
    parallel_state.initialize_model_parallel()
    plain, early = wrap(Stack()), wrap(Stack(), overlap_grad_reduce=True)
    for one in (plain, early):
        one.module.is_tied, one.module.recompute = "tied" in variant, "recompute" in variant
    for step in range(3):
        for one in (plain, early):
            backward(one, step)
            one.finish_grad_sync()
        grads, expected = ([p.main_grad for p in one.module.parameters()] for one in (early, plain))
        torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-7)


def test_a_part_that_comes_too_late_is_an_error_and_not_lost() -> None:
    with pytest.raises(RankFailure, match=r"layers\.3\.bias received part 2 .* it used to receive 1"):
        run_ranks(2, send_a_part_too_late)


def send_a_part_too_late() -> None:
    parallel_state.initialize_model_parallel()
    ddp = wrap(Stack(), overlap_grad_reduce=True)
    backward(ddp, 0)
    ddp.finish_grad_sync()
    backward(ddp, 1)
    ddp(batch(2)).sum().backward()  # another microbatch, outside of no_sync


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_whose_gradients_come_in_different_orders_launch_in_the_same_order(sharded: bool) -> None:
    run_ranks(2, check_missing_gradients, sharded)


def check_missing_gradients(sharded: bool) -> None:
    parallel_state.initialize_model_parallel()
    plain = wrap(Stack(), use_distributed_optimizer=sharded, overlap_grad_reduce=True)
    plain.grad_reducer.overlap = False
    early = wrap(Stack(), use_distributed_optimizer=sharded, overlap_grad_reduce=True)
    for step in range(4):
        unused = 3 - (step + parallel_state.get_data_parallel_rank()) % LAYERS
        for one in (plain, early):
            one.module.kept = [i != unused for i in range(LAYERS)]
            backward(one, step)
            one.finish_grad_sync()
        torch.testing.assert_close(owned_grads(early), owned_grads(plain), rtol=0, atol=0)


def test_aligned_reduction_is_launched_at_once_by_the_schedule() -> None:
    run_ranks(2, check_explicit_launch)


def check_explicit_launch() -> None:
    parallel_state.initialize_model_parallel()
    plain, early = wrap(Stack()), wrap(Stack(), overlap_grad_reduce=True)
    for step in range(2):
        backward(plain, step)
        plain.finish_grad_sync()
        with early.no_sync():
            backward(early, step)
        assert not any(group.is_grad_sync_started for group in early.bucket_groups)
        early.start_grad_sync()
        assert all(group.is_grad_sync_started for group in early.bucket_groups)
        early.finish_grad_sync()
        grads, expected = ([p.main_grad for p in one.module.parameters()] for one in (early, plain))
        torch.testing.assert_close(grads, expected, rtol=0, atol=0)


# --- weights ---


def pair(dtype: torch.dtype = torch.float32, **ddp: Any) -> tuple[Any, Any]:
    """(chunk, optimizer) that gather after the step, and two that gather during forward."""
    chunks = [
        wrap(Stack(dtype), use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=late, **ddp)
        for late in (False, True)
    ]
    return tuple((chunk, optimizer_of([chunk])) for chunk in chunks)  # type: ignore[return-value]


def same_weights(late: DistributedDataParallel, plain: DistributedDataParallel) -> None:
    """Read without asking for them first."""
    torch.testing.assert_close(list(late.module.parameters()), list(plain.module.parameters()), rtol=0, atol=0)


def is_stale(ddp: DistributedDataParallel) -> bool:
    return any(group.weights is not Weights.WHOLE for group in ddp.bucket_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 4])
def test_training_on_gathered_weights_gives_the_bits_of_the_plain_way(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(world_size, check_training, dtype)


def check_training(dtype: torch.dtype) -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair(dtype)
    for step in range(4):
        train(plain, plain_optimizer, range(step, step + 1))
        train(late, late_optimizer, range(step, step + 1))
        assert is_stale(late) and not is_stale(plain)
        with torch.no_grad():
            late.eval()
            torch.testing.assert_close(
                late(batch(50).to(dtype)), plain(batch(50).to(dtype)), rtol=0, atol=0
            )  # evaluation, the first reader
            late.train()
        assert not is_stale(late)
        same_weights(late, plain)


def test_weights_are_gathered_in_forward_order_each_wait_launching_the_next() -> None:
    run_ranks(2, check_order_of_gathering)


def check_order_of_gathering() -> None:
    parallel_state.initialize_model_parallel()
    _, (late, optimizer) = pair()
    train(late, optimizer, range(1))
    groups = late.bucket_groups[::-1]  # in forward order
    seen = []
    for layer in late.module.layers:
        layer.register_forward_hook(lambda *unused: seen.append([group.weights.name for group in groups]))
    assert [group.weights.name for group in groups] == ["IN_FLIGHT", "STALE", "STALE", "STALE"]
    late(batch(1))
    assert seen == [
        ["WHOLE", "IN_FLIGHT", "STALE", "STALE"],
        ["WHOLE", "WHOLE", "IN_FLIGHT", "STALE"],
        ["WHOLE", "WHOLE", "WHOLE", "IN_FLIGHT"],
        ["WHOLE", "WHOLE", "WHOLE", "WHOLE"],
    ]


@pytest.mark.parametrize("reader", ["state_dict", "state_dict_for_save_checkpoint", "finish_param_sync", "disable"])
def test_nobody_reads_stale_weights(reader: str) -> None:
    run_ranks(2, check_reader, reader)


def check_reader(reader: str) -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair()
    late.module.state_dict_for_save_checkpoint = lambda prefix="", keep_vars=False: late.module.state_dict()
    for chunk, optimizer in ((plain, plain_optimizer), (late, late_optimizer)):
        train(chunk, optimizer, range(2))
    if reader == "disable":
        late.disable_forward_pre_hook()
    else:
        getattr(late, reader)()
    same_weights(late, plain)


def test_without_hooks_forward_would_read_stale_weights() -> None:
    """The tests above could not fail if gathering were not needed."""
    run_ranks(2, check_stale_forward)


def check_stale_forward() -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair()
    for chunk, optimizer in ((plain, plain_optimizer), (late, late_optimizer)):
        train(chunk, optimizer, range(1))
    late.disable_forward_pre_hook(param_sync=False)
    assert not torch.equal(late(batch(1)), plain(batch(1)))
    late.enable_forward_pre_hook()
    late.enable_forward_pre_hook()  # once is enough
    torch.testing.assert_close(late(batch(1)), plain(batch(1)), rtol=0, atol=0)


def test_layers_that_no_forward_uses_and_steps_without_forward() -> None:
    run_ranks(2, check_unused_layers)


def check_unused_layers() -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair()
    for chunk, optimizer in ((plain, plain_optimizer), (late, late_optimizer)):
        for step, kept in enumerate([[True] * 4, [False, True, True, False], [False] * 3 + [True], [True] * 4]):
            chunk.module.kept = kept
            train(chunk, optimizer, range(step, step + 1))
        optimizer.step()  # again with the same gradients
    assert is_stale(late)
    late.finish_param_sync()
    same_weights(late, plain)


def test_loading_into_a_chunk_whose_weights_are_in_flight() -> None:
    run_ranks(2, check_loading)


def check_loading() -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair()
    saved = {name: value.clone() for name, value in plain.state_dict().items()}
    for chunk, optimizer in ((plain, plain_optimizer), (late, late_optimizer)):
        train(chunk, optimizer, range(2))
        chunk.load_state_dict(saved)
        optimizer.reload_model_params()
        train(chunk, optimizer, range(2, 4))
    late.finish_param_sync()
    same_weights(late, plain)


def test_aligned_gathering_waits_for_the_schedule_to_start_it() -> None:
    run_ranks(2, check_aligned_gathering)


def check_aligned_gathering() -> None:
    parallel_state.initialize_model_parallel()
    (plain, plain_optimizer), (late, late_optimizer) = pair(align_param_gather=True)
    for step in range(3):
        train(plain, plain_optimizer, range(step, step + 1))
        train(late, late_optimizer, range(step, step + 1))
        assert {group.weights for group in late.bucket_groups} == {Weights.STALE}
        late.start_param_sync()
        assert {group.weights for group in late.bucket_groups} == {Weights.IN_FLIGHT}
        late.start_param_sync()  # the next microbatch's call finds nothing to do
    late.finish_param_sync()
    same_weights(late, plain)
    late.start_param_sync(force_sync=True)
    same_weights(late, plain)


def test_first_chunk_is_gathered_while_the_second_is_updated() -> None:
    run_ranks(2, check_gather_during_step)


def check_gather_during_step() -> None:
    parallel_state.initialize_model_parallel()
    seen: list[str] = []
    early, late = train_two_chunks(seen, early=True), train_two_chunks([], early=False)
    torch.testing.assert_close(early, late, rtol=1e-6, atol=1e-7)
    assert seen == ["IN_FLIGHT"] * 3


def train_two_chunks(seen: list[str], *, early: bool) -> list[dict[str, Tensor]]:
    """Weights after three steps; `seen` gets the state of the first chunk's weights as the second is updated."""
    overlapped = dict.fromkeys(
        ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "align_param_gather"), True
    )
    chunks = [wrap(Stack(), **overlapped) for _ in range(2)]
    optimizer = optimizer_of(chunks, overlap_param_gather_with_optimizer_step=early, clip_grad=1.0)
    if early:
        second = optimizer.chained_optimizers[1]
        update = second.update_weights

        def noted() -> None:
            seen.append(chunks[0].bucket_groups[-1].weights.name)
            update()

        second.update_weights = noted
    for step in range(3):
        optimizer.zero_grad()
        for chunk in chunks:
            backward(chunk, step)
            chunk.finish_grad_sync()
        optimizer.step()
    return [chunk.state_dict() for chunk in chunks]
