"""Weights that are kept and gathered in fp8."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron.core import collectives, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8.attach import compute_in_fp8
from megatron.core.fp8.delayed import update_delayed_scales
from megatron.core.fp8.quantization import cast, scale_for
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import default_process_groups
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

E4M3 = torch.float8_e4m3fn
SIZES, OUT = (24, 40), 16
NUMEL = SIZES[0] * SIZES[1] + SIZES[1] * OUT
"""The border between two ranks cuts through a weight."""


def build(recipe: str, **ddp: Any) -> tuple[DistributedDataParallel, Any]:
    """Two linear layers and a norm in bf16, and their optimizer."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        fp8="hybrid",
        fp8_recipe=recipe,
        fp8_param=True,
        gradient_accumulation_fusion=True,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    torch.manual_seed(0)
    make: dict[str, Any] = {"config": config, "init_method": nn.init.normal_, "bias": False, "skip_bias_add": False}
    first, norm = ColumnParallelLinear(*SIZES, **make), nn.LayerNorm(SIZES[1], dtype=torch.bfloat16)
    second = RowParallelLinear(SIZES[1], OUT, input_is_parallel=True, **make)
    model = nn.ModuleList([first, norm, second])
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.copy_(torch.randn(layer.weight.shape) * torch.logspace(-2, 1, layer.weight.size(1)))
    compute_in_fp8(model, config, 1, default_process_groups())
    settings: dict[str, Any] = {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": True,
        "fp8_param_gather": True,
    }
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(**settings, **ddp), model)
    rules = {"lr": 0.05, "bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    return wrapped, get_megatron_optimizer(OptimizerConfig(clip_grad=0.0, **rules), [wrapped])


def step(wrapped: DistributedDataParallel, optimizer: Any, seed: int) -> None:
    """One with gradients that all ranks have, whose mean is exact."""
    wrapped.zero_grad_buffer()
    generator = torch.Generator().manual_seed(seed)
    for param in wrapped.module.parameters():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator))
    wrapped.finish_grad_sync()
    update_delayed_scales([wrapped])
    optimizer.step()


def linear_layers(wrapped: DistributedDataParallel) -> list[Any]:
    return [wrapped.module[0], wrapped.module[2]]


def trained(recipe: str, overlap: bool) -> dict[str, Any]:
    """What a rank has after two steps."""
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    wrapped, optimizer = build(recipe, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    gathered: list[Tensor] = []
    gather = collectives._all_gather

    def count(whole: Tensor, part: Tensor, **options: Any) -> Any:
        gathered.append(whole)
        return gather(whole, part, **options)

    with mock.patch.object(collectives, "_all_gather", count):
        step(wrapped, optimizer, 1)
        wrapped.finish_param_sync(widen=False)
    step(wrapped, optimizer, 2)
    wrapped.finish_param_sync(widen=False)
    layers = linear_layers(wrapped)
    stored = [layer.weight.detach().view(torch.uint8).clone() for layer in layers]
    assert all(layer.weight.dtype == E4M3 for layer in layers) and wrapped.module[1].weight.dtype == torch.bfloat16
    scales = [layer.products.kept_scale for layer in layers]
    kept = [buffer for buffer in wrapped.param_and_grad_buffers if buffer.in_fp8]
    assert [buffer.param_data for buffer in kept] == [None], "weights in bf16 are still there"
    wrapped.finish_param_sync()
    wide = [layer.weight.detach().clone() for layer in layers]
    assert all(weight.dtype == torch.bfloat16 for weight in wide)
    for weight, scale, found in zip(wide, scales, stored):
        assert torch.equal(cast(weight, scale, E4M3).view(torch.uint8), found), "not what the main params are cast to"
    by_type = {
        dtype: sum(one.numel() for one in gathered if one.dtype == dtype) for dtype in {g.dtype for g in gathered}
    }
    return {"stored": stored, "scales": scales, "wide": wide, "gathered": by_type, "ranks": ranks}


@pytest.mark.parametrize(("recipe", "overlap"), [("delayed", True), ("tensorwise", False)])
def test_two_ranks_keep_the_bytes_and_scales_of_one(recipe: str, overlap: bool) -> None:
    (alone,) = run_ranks(1, trained, recipe, overlap)
    both = run_ranks(2, trained, recipe, overlap)
    for found in both:
        for name in ("stored", "scales", "wide"):
            assert all(map(torch.equal, found[name], alone[name])), name
        padded = 128 * -(-NUMEL // 128)
        assert found["gathered"] == {torch.uint8: padded, torch.bfloat16: 128}, "a byte a weight, two for the norm's"


def taken_over(recipe: str) -> None:
    """A write into widened weights reaches main params and bytes, and no further than that."""
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    wrapped, optimizer = build(recipe)
    layer = wrapped.module[0]
    before = layer.weight.detach().view(torch.uint8).clone()
    state = wrapped.state_dict()
    assert state["0.weight"].dtype == torch.bfloat16, "checkpoints hold weights in their own type"
    wrapped.narrow_weights()
    assert torch.equal(layer.weight.detach().view(torch.uint8), before)
    new = {name: value * 3 if name == "0.weight" else value for name, value in state.items()}
    wrapped.load_state_dict(new)
    optimizer.reload_model_params()
    assert layer.weight.dtype == E4M3
    scale = scale_for(new["0.weight"].abs().max().float(), E4M3)
    torch.testing.assert_close(layer.products.kept_scale, scale)
    assert torch.equal(layer.weight.detach().view(torch.uint8), cast(new["0.weight"], scale, E4M3).view(torch.uint8))
    wrapped.finish_param_sync()
    assert torch.equal(layer.weight, new["0.weight"])


def test_loaded_weights_reach_main_params_unrounded() -> None:
    run_ranks(2, taken_over, "delayed")


def refused() -> list[str]:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    found = []
    wrapped, _ = build("delayed")
    for config, ddp in (
        (wrapped.config, {}),
        (TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), {"fp8_param_gather": True}),
    ):
        with pytest.raises(ValueError, match="must be what fp8_param") as error:
            DistributedDataParallel(
                config, DistributedDataParallelConfig(use_distributed_optimizer=True, **ddp), wrapped.module
            )
        found.append(str(error.value))
    rules: dict[str, Any] = {"lr": 0.1, "bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    with pytest.raises(ValueError, match="does not work with use_precision_aware_optimizer"):
        get_megatron_optimizer(OptimizerConfig(**rules, use_precision_aware_optimizer=True), [wrapped])
    return found


def test_halves_of_the_setting_are_refused() -> None:
    (messages,) = run_ranks(1, refused)
    assert len(messages) == 2
