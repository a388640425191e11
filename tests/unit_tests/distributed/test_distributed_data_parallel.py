from typing import Any

import pytest
import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.distributed_data_parallel import accumulate
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

SAMPLES, FEATURES = 8, 12


def transformer_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **changes)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 20), nn.GELU(), nn.Linear(20, 3)).to(dtype)


def samples() -> torch.Tensor:
    return torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x.to(next(model.parameters()).dtype)).float().square().sum()


def wrap(model: nn.Module, config: TransformerConfig | None = None, **ddp: Any) -> DistributedDataParallel:
    return DistributedDataParallel(config or transformer_config(), DistributedDataParallelConfig(**ddp), model)


def serial_grads(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradient of the mean over all samples, in one process without the wrapper."""
    model = make_model()
    (loss_of(model, samples()) / SAMPLES * scale).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def reduced_grads(ddp: DistributedDataParallel) -> dict[str, torch.Tensor]:
    """Gradients after a step's microbatches on this rank's share of the samples."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = samples().chunk(ranks)[rank]
    microbatches = own.split(2)
    ddp.zero_grad_buffer()
    with ddp.no_sync():
        for microbatch in microbatches[:-1]:
            (loss_of(ddp, microbatch) / len(own)).backward()
    (loss_of(ddp, microbatches[-1]) / len(own)).backward()
    assert all(param.grad is None for param in ddp.parameters())
    ddp.finish_grad_sync()
    return {name: param.main_grad.clone() for name, param in ddp.module.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("average_in_collective", [False, True])
def test_gradients_equal_those_of_one_process(world_size: int, average_in_collective: bool) -> None:
    for grads in run_ranks(world_size, all_reduced, average_in_collective):
        torch.testing.assert_close(grads, serial_grads())


def all_reduced(average_in_collective: bool) -> dict[str, torch.Tensor]:
    parallel_state.initialize_model_parallel()
    return reduced_grads(wrap(make_model(), average_in_collective=average_in_collective))


def test_reduction_of_each_step_starts_from_zero() -> None:
    run_ranks(2, check_second_step_equals_first)


def check_second_step_equals_first() -> None:
    parallel_state.initialize_model_parallel()
    ddp = wrap(make_model())
    torch.testing.assert_close(reduced_grads(ddp), reduced_grads(ddp), rtol=0, atol=0)


def test_reduce_scatter_leaves_the_own_range_equal_to_the_all_reduce() -> None:
    run_ranks(4, check_reduce_scatter)


def check_reduce_scatter() -> None:
    parallel_state.initialize_model_parallel()
    expected = reduced_grads(wrap(make_model()))
    ddp = wrap(make_model(), use_distributed_optimizer=True)
    reduced_grads(ddp)
    (buffer,) = ddp.param_and_grad_buffers
    (bucket,) = buffer.buckets
    start, end = bucket.layout.shard(parallel_state.get_data_parallel_rank(), 4)
    flat = torch.zeros(buffer.numel)
    for (name, _), (first, last) in zip(ddp.module.named_parameters(), buffer.layout.spans):
        flat[first:last] = expected[name].flatten()
    torch.testing.assert_close(buffer.grad_data[start:end], flat[start:end], rtol=1e-6, atol=1e-7)


def test_sharded_weights_are_views_of_the_buffer_and_gathered_from_their_owners() -> None:
    run_ranks(2, check_param_sync)


def check_param_sync() -> None:
    parallel_state.initialize_model_parallel()
    before = make_model().state_dict()
    ddp = wrap(make_model(), use_distributed_optimizer=True)
    torch.testing.assert_close(ddp.state_dict(), before, rtol=0, atol=0)
    (buffer,) = ddp.param_and_grad_buffers
    rank = parallel_state.get_data_parallel_rank()
    (bucket,) = buffer.buckets
    buffer.param_data.fill_(-1.0)
    bucket.shard(buffer.param_data, buffer.data_parallel_group).fill_(float(rank))
    ddp.start_param_sync()
    expected = torch.arange(2.0).repeat_interleave(buffer.numel // 2)
    torch.testing.assert_close(buffer.param_data, expected, rtol=0, atol=0)
    assert ddp.module[0].weight.flatten()[-1] in (0.0, 1.0)


@pytest.mark.parametrize("grad_reduce_in_fp32", [False, True])
def test_gradient_type_and_accumulation_in_it(grad_reduce_in_fp32: bool) -> None:
    run_ranks(1, check_gradient_type, grad_reduce_in_fp32)


def check_gradient_type(grad_reduce_in_fp32: bool) -> None:
    parallel_state.initialize_model_parallel()
    model = make_model(torch.bfloat16)
    ddp = wrap(model, grad_reduce_in_fp32=grad_reduce_in_fp32)
    dtype = torch.float32 if grad_reduce_in_fp32 else torch.bfloat16
    expected: dict[str, torch.Tensor] = {}
    for x in samples().split(2):
        loss_of(ddp, x).backward()
        reference = make_model(torch.bfloat16)
        loss_of(reference, x).backward()
        for name, param in reference.named_parameters():
            expected[name] = expected.get(name, torch.zeros_like(param, dtype=dtype)) + param.grad
    grads = {name: param.main_grad for name, param in model.named_parameters()}
    assert {grad.dtype for grad in grads.values()} == {dtype}
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3,), (700, 1000)])
def test_mixed_types_accumulate_as_if_widened_first(shape: tuple[int, ...]) -> None:
    total, addend = torch.randn(shape), torch.randn(shape[::-1]).bfloat16()
    expected = total + addend.float().T if len(shape) == 2 else total + addend.float()
    accumulate(total, addend.T if len(shape) == 2 else addend)
    torch.testing.assert_close(total, expected, rtol=0, atol=0)


def test_per_token_loss_sums_gradients_and_scale_gradients_divides_them() -> None:
    run_ranks(2, check_per_token_loss)


def check_per_token_loss() -> None:
    parallel_state.initialize_model_parallel()
    ddp = wrap(make_model(), transformer_config(calculate_per_token_loss=True))
    reduced_grads(ddp)  # both ranks divide by their own 4 samples, so the sum is twice the mean
    ddp.scale_gradients(0.5)
    grads = {name: param.main_grad for name, param in ddp.module.named_parameters()}
    torch.testing.assert_close(grads, serial_grads())


def test_per_token_loss_excludes_the_averaging_collective() -> None:
    with pytest.raises(ValueError, match="average_in_collective.*calculate_per_token_loss"):
        wrap(make_model(), transformer_config(calculate_per_token_loss=True), average_in_collective=True)


def test_buffers_by_type_and_experts_apart() -> None:
    model = make_model()
    model[2].bfloat16()
    expert = nn.Linear(4, 4)
    for param in expert.parameters():
        param.allreduce = False
    model.append(expert)
    ddp = wrap(model)
    assert [(b.param_dtype, b.grad_dtype, len(b.params)) for b in ddp.param_and_grad_buffers] == [
        (torch.float32, torch.float32, 2),
        (torch.bfloat16, torch.bfloat16, 2),
    ]
    assert [buffer.params for buffer in ddp.expert_param_and_grad_buffers] == [list(expert.parameters())]


def test_expert_gradients_are_averaged_over_all_ranks_but_reduced_among_replicas() -> None:
    for grad in run_ranks(4, expert_grad):
        # EP 2 × EDP 2: ranks r and r+2 are replicas; each sums its own 1 + rank, divided by all four ranks
        assert grad in (torch.tensor((1.0 + 3.0) / 4), torch.tensor((2.0 + 4.0) / 4))


def expert_grad() -> torch.Tensor:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model = nn.Linear(1, 1, bias=False)
    model.weight.allreduce = False
    ddp = wrap(model)
    ddp(torch.full((1, 1), 1.0 + torch.distributed.get_rank())).sum().backward()
    ddp.finish_grad_sync()
    return model.weight.main_grad.squeeze()


def test_frozen_and_unused_parameters() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    model.append(nn.Linear(3, 3))
    ddp = wrap(model)
    model[:3](samples()).sum().backward()
    ddp.finish_grad_sync()
    assert not hasattr(model[0].weight, "main_grad")
    assert model[3].weight.main_grad.count_nonzero() == 0
    assert model[2].weight.main_grad.count_nonzero() > 0


def test_gradient_that_a_kernel_has_added_itself_is_not_added_twice() -> None:
    model = nn.Linear(2, 2, bias=False)
    ddp = wrap(model)
    for added, own_grad_counts, expected in ((True, False, 1.0), (True, True, 2.0), (False, False, 2.0)):
        ddp.zero_grad_buffer()
        assert model.weight.grad_added_to_main_grad is False
        model.weight.main_grad.fill_(1.0)
        model.weight.grad_added_to_main_grad = added
        model.weight.zero_out_wgrad = own_grad_counts
        ddp(torch.ones(1, 2)).sum().backward()
        torch.testing.assert_close(model.weight.main_grad, torch.full((2, 2), expected))


def test_nan_is_reported_with_the_first_bad_parameter_before_it_spreads() -> None:
    with pytest.raises(AssertionError, match=r"gradient of 2\.weight has 1 NaN or infinite values of 60 on rank 1"):
        run_ranks(2, put_nan_into_gradient)


def put_nan_into_gradient() -> None:
    parallel_state.initialize_model_parallel()
    model = make_model()
    ddp = wrap(model, check_for_nan_in_grad=True)
    loss_of(ddp, samples()).backward()
    if torch.distributed.get_rank() == 1:
        model[2].weight.main_grad[0, 0] = float("inf")
        model[2].bias.main_grad[0] = float("nan")
    ddp.finish_grad_sync()


def test_large_gradients_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2, bias=False)
    ddp = wrap(model, check_for_large_grads=True)
    for scale, warnings in [(1.0, 0)] * 100 + [(9.0, 0), (11.0, 1)]:
        ddp.zero_grad_buffer()
        (ddp(torch.ones(1, 2)).sum() * scale).backward()
        ddp.finish_grad_sync()
        assert len(caplog.records) == warnings
    assert "more than 10 times the largest of the first 100" in caplog.text


def test_broadcast_params_copies_the_first_replica() -> None:
    weights = run_ranks(2, broadcast_weights)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def broadcast_weights() -> torch.Tensor:
    parallel_state.initialize_model_parallel()
    torch.manual_seed(torch.distributed.get_rank())
    ddp = wrap(nn.Linear(3, 3))
    ddp.broadcast_params()
    return ddp.module.weight.detach()


def test_state_dict_has_no_trace_of_the_wrapper() -> None:
    ddp = wrap(make_model())
    assert list(ddp.state_dict(prefix="p.")) == ["p.0.weight", "p.0.bias", "p.2.weight", "p.2.bias"]
    other = wrap(nn.Sequential(nn.Linear(FEATURES, 20), nn.GELU(), nn.Linear(20, 3)))
    other.load_state_dict(ddp.state_dict())
    torch.testing.assert_close(other.module[0].weight, ddp.module[0].weight, rtol=0, atol=0)


def test_groups_can_be_handed_in() -> None:
    run_ranks(2, check_explicit_groups)


def check_explicit_groups() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    world = torch.distributed.group.WORLD
    groups = ProcessGroupCollection(dp_cp=world, intra_dp_cp=world)
    ddp = DistributedDataParallel(
        transformer_config(),
        DistributedDataParallelConfig(),
        nn.Linear(1, 1, bias=False),
        grad_comm_pgs=groups,
    )
    ddp(torch.full((1, 1), float(torch.distributed.get_rank()))).sum().backward()
    ddp.finish_grad_sync()
    assert ddp.module.weight.main_grad.item() == 0.5
