"""Linear layers in fp8 against their products written out, in one process and cut over several."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.fp8.attach import compute_in_fp8
from megatron.core.fp8.delayed import update_delayed_scales
from megatron.core.fp8.quantization import cast, quantize_blocks, scale_for
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection, default_process_groups
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.weight_grad_queue import WeightGradQueue, deferring_weight_grads
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS: dict[str, Any] = {"tensorwise": (None, None), "blockwise": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32))}


def config(tp: int = 1, **settings: Any) -> TransformerConfig:
    defaults: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "fp8": "hybrid"}
    defaults |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "tensor_model_parallel_size": tp}
    return TransformerConfig(**(defaults | settings))


def as_fp8(x: Tensor, dtype: torch.dtype, block: Any) -> Tensor:
    """The values of x [m, k] for a product over k, written out."""
    if block is not None:
        return quantize_blocks(x.float(), dtype, block, power_of_two=True).dequantized()
    scale = scale_for(x.float().abs().max(), dtype)
    return cast(x, scale, dtype).float() * scale


def expected(x: Tensor, weight: Tensor, dy: Tensor, recipe: str, gradient: torch.dtype) -> tuple[Tensor, ...]:
    """(x Wᵀ, dy W, dyᵀ x), each operand quantized along the dimension that is summed over."""
    block, of_weight = BLOCKS[recipe]
    y = as_fp8(x, E4M3, block) @ as_fp8(weight, E4M3, of_weight).t()
    dx = as_fp8(dy, gradient, block) @ as_fp8(weight.t(), E4M3, of_weight).t()
    dw = as_fp8(dy.t(), gradient, block) @ as_fp8(x.t(), E4M3, block).t()
    return y, dx, dw


def column(setting: TransformerConfig, n: int, k: int, **more: Any) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(k, n, config=setting, init_method=torch.nn.init.normal_, bias=False, **more)
    compute_in_fp8(layer, setting, 1, ProcessGroupCollection())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, k) * torch.logspace(-2, 0, k))
    return layer


@pytest.mark.parametrize("recipe", BLOCKS)
@pytest.mark.parametrize(("form", "gradient"), [("hybrid", E5M2), ("e4m3", E4M3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_three_products_have_fp8_operands(
    recipe: str, form: Any, gradient: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    setting = config(fp8=form, fp8_recipe=recipe, params_dtype=dtype, gradient_accumulation_fusion=True)
    layer = column(setting, 40, 200)
    layer.weight.main_grad = torch.full(layer.weight.shape, 0.25)
    x = (torch.randn(5, 7, 200) * torch.logspace(-3, 1, 7)[:, None]).to(dtype).requires_grad_()
    dy = (torch.randn(5, 7, 40) * 1e-4).to(dtype)
    y, _ = layer(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    wanted = expected(x.detach().reshape(35, 200), layer.weight.detach(), dy.view(35, 40), recipe, gradient)
    found = (y.view(35, 40), x.grad.view(35, 200), layer.weight.main_grad - 0.25)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of y and dx; dW goes to its fp32 accumulator as it is
    for one, other, rtol, scale in zip(found, wanted, (rounding, rounding, 1e-5), (1, 1e-4, 1)):
        torch.testing.assert_close(one.float(), other, rtol=rtol, atol=1e-5 * scale)
    exact = x.detach().float().reshape(35, 200) @ layer.weight.detach().float().t()
    error = float((y.detach().view(35, 40).float() - exact).norm() / exact.norm())
    assert 0.005 < error < 0.06, f"not the error of a rounding to e4m3: {error}"


def test_weight_gradients_keep_their_type_on_request() -> None:
    torch.manual_seed(1)
    layer = column(config(fp8_recipe="tensorwise", fp8_wgrad=False), 16, 32)
    x, dy = torch.randn(4, 2, 32, requires_grad=True), torch.randn(4, 2, 16)
    layer(x)[0].backward(dy)
    torch.testing.assert_close(layer.weight.grad, dy.view(8, 16).t() @ x.detach().reshape(8, 32))
    _, dx, _ = expected(x.detach().reshape(8, 32), layer.weight.detach(), dy.view(8, 16), "tensorwise", E5M2)
    torch.testing.assert_close(x.grad.view(8, 32), dx)


@pytest.mark.parametrize("recipe", BLOCKS)
def test_postponed_weight_gradients_are_the_same(recipe: str) -> None:
    torch.manual_seed(1)
    layer = column(config(fp8_recipe=recipe), 16, 64)
    x, dy = torch.randn(4, 2, 64), torch.randn(4, 2, 16)
    layer(x)[0].backward(dy)
    at_once, layer.weight.grad = layer.weight.grad, None
    queue = WeightGradQueue()
    with deferring_weight_grads(queue):
        layer(x)[0].backward(dy)
    queue.run()
    assert torch.equal(at_once, layer.weight.grad)


# --- delayed scaling ---


def step(layer: ColumnParallelLinear, x: Tensor, dy: Tensor) -> Tensor:
    y, _ = layer(x)
    y.backward(dy)
    update_delayed_scales([layer], ProcessGroupCollection())
    return y.detach()


@pytest.mark.parametrize(("algorithm", "last"), [("most_recent", 4.0), ("max", 16.0)])
def test_scales_follow_the_maxima_of_earlier_steps(algorithm: Any, last: float) -> None:
    layer = column(config(fp8_amax_history_len=2, fp8_amax_compute_algo=algorithm, fp8_margin=1), 16, 16)
    unit, dy = torch.eye(16).view(16, 1, 16), torch.ones(16, 1, 16)
    scales = layer.products.delayed
    step(layer, unit * 100, dy)
    assert scales.scales[0] == 2 * 100 / 448
    for magnitude in (16.0, 4.0):
        layer(unit * magnitude / 2)  # further microbatches count as well
        step(layer, unit * magnitude, dy)
    assert scales.scales[0] == 2 * last / 448
    torch.testing.assert_close(scales.history[:, 0], torch.tensor([4.0, 16.0]))
    layer.eval()
    with torch.no_grad():
        layer(unit * 1000)
    assert scales.seen.eq(0).all(), "an evaluation changed what training will do"


def test_a_step_with_infinity_leaves_the_scales() -> None:
    torch.manual_seed(0)
    layer = column(config(), 16, 16)
    x, dy = torch.randn(16, 1, 16), torch.randn(16, 1, 16)
    step(layer, x, dy)
    before = layer.products.delayed.scales.clone()
    assert step(layer, torch.where(x > 2, float("inf"), x), dy).isnan().any()
    assert torch.equal(layer.products.delayed.scales, before)
    assert step(layer, x, dy).isfinite().all()


def test_state_goes_through_a_state_dict() -> None:
    torch.manual_seed(0)
    setting = config(fp8_amax_history_len=3)
    layer = column(setting, 16, 16)
    for size in (1.0, 5.0):
        step(layer, torch.randn(8, 1, 16) * size, torch.randn(8, 1, 16))
    state = copy.deepcopy(layer.state_dict())
    other = column(setting, 16, 16)
    other.load_state_dict(state)
    x, dy = torch.randn(8, 1, 16), torch.randn(8, 1, 16)
    for _ in range(2):
        assert torch.equal(step(layer, x, dy), step(other, x, dy))
    plain = ColumnParallelLinear(16, 16, config=setting, init_method=torch.nn.init.normal_, bias=False)
    plain.load_state_dict(state)
    column(setting, 16, 16).load_state_dict(plain.state_dict())


# --- experts ---


@pytest.mark.parametrize("recipe", [*BLOCKS, "delayed"])
def test_stacked_experts_are_the_experts_one_by_one(recipe: str) -> None:
    run_ranks(1, check_experts, recipe)


def check_experts(recipe: str) -> None:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    more = {"num_moe_experts": 3, "moe_ffn_hidden_size": 48, "add_bias_linear": False, "fp8_recipe": recipe}
    setting = config(**more, gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    single, stacked = SequentialMLP(3, setting, parts), GroupedMLP(3, setting)
    for experts in (single, stacked):
        compute_in_fp8(experts, setting, 1, default_process_groups())
    with torch.no_grad():
        for e, expert in enumerate(single.local_experts):
            stacked.weight1[e].copy_(expert.linear_fc1.weight.normal_())
            stacked.weight2[e].copy_(expert.linear_fc2.weight.normal_())
    counts, probabilities = torch.tensor([5, 0, 7]), torch.rand(12)
    for _ in range(2):
        x, dy = torch.randn(12, 64), torch.randn(12, 64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [e(i, counts, probabilities)[0] for e, i in zip((single, stacked), inputs)]
        for output in outputs:
            output.backward(dy)
        assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)
        for e, expert in enumerate(single.local_experts):
            assert torch.equal(stacked.weight1.grad[e], expert.linear_fc1.weight.grad)
        update_delayed_scales([single, stacked])
    described = [experts.sharded_state_dict("") for experts in (single, stacked)]
    names = [{v.unique_key for k, v in d.items() if k.endswith("_extra_state")} for d in described]
    assert names[0] == names[1] and bool(names[0]) == (recipe == "delayed")


# --- layouts ---


def build_block(setting: TransformerConfig) -> TransformerBlock:
    return TransformerBlock(setting, get_gpt_layer_local_spec(fp8=setting.fp8))


def run_block(block: TransformerBlock, x: Tensor, dy: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
    outputs = []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        y = block(leaf, None)
        y.backward(dy)
        update_delayed_scales([block])
        outputs.append(y.detach())
    return outputs, leaf.grad


@pytest.mark.parametrize("recipe", [*BLOCKS, "delayed"])
def test_recompute_changes_nothing(recipe: str) -> None:
    run_ranks(1, check_recompute, recipe)


def check_recompute(recipe: str) -> None:
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    setting = config(fp8_recipe=recipe)
    torch.manual_seed(0)
    x, dy = torch.randn(16, 2, 64), torch.randn(16, 2, 64)
    block = build_block(setting)
    weights = copy.deepcopy(block.state_dict())
    kept = run_block(block, x, dy, 2)
    for how in (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
    ):
        again = build_block(replace(setting, **how))
        again.load_state_dict(weights)
        outputs, dx = run_block(again, x, dy, 2)
        assert all(map(torch.equal, kept[0], outputs)) and torch.equal(kept[1], dx)


@pytest.mark.parametrize(
    ("recipe", "sequence_parallel"),
    [("tensorwise", False), ("delayed", False), *((recipe, True) for recipe in (*BLOCKS, "delayed"))],
)
def test_two_ranks_compute_what_one_does(recipe: str, sequence_parallel: bool) -> None:
    found = [run_ranks(tp, layer_of_two_products, tp, recipe, sequence_parallel and tp > 1) for tp in (1, 2)]
    (alone,), both = found
    torch.testing.assert_close(torch.cat([part["dw1"] for part in both]), alone["dw1"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part["dw2"] for part in both], 1), alone["dw2"], rtol=1e-4, atol=1e-5)
    for name in ("y", "dx"):
        parts = [part[name] for part in both]
        whole = torch.cat(parts) if sequence_parallel else parts[0]
        torch.testing.assert_close(whole, alone[name], rtol=1e-4, atol=1e-5)


def layer_of_two_products(tp: int, recipe: str, sequence_parallel: bool) -> dict[str, Tensor]:
    """Column, then row-parallel, what is between them without a gradient: it would carry differences of one rounding
    into the next cast, where they become those of fp8."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    setting = config(tp, hidden_size=256, fp8_recipe=recipe, sequence_parallel=sequence_parallel)
    torch.manual_seed(0)
    rank = parallel_state.get_tensor_model_parallel_rank()
    first = ColumnParallelLinear(256, 256, config=setting, init_method=torch.nn.init.normal_, bias=False)
    second = RowParallelLinear(
        *(256, 256), config=setting, init_method=torch.nn.init.normal_, bias=False, input_is_parallel=True,
        skip_bias_add=False,
    )  # fmt: skip
    weights = [torch.randn(256, 256) * torch.logspace(-1, 1, 256)[:, None] for _ in range(2)]
    with torch.no_grad():
        first.weight.copy_(weights[0].chunk(tp, 0)[rank])
        second.weight.copy_(weights[1].chunk(tp, 1)[rank])
    for layer in (first, second):
        compute_in_fp8(layer, setting, 1, default_process_groups())
    x, between, dy, dbetween = (torch.randn(4, 64, 256) for _ in range(4))
    cut = (lambda t: t.chunk(tp, 0)[rank]) if sequence_parallel else (lambda t: t)
    for size in (3.0, 1.0):  # with delayed scaling the second step has the scales of the first
        first.weight.grad = second.weight.grad = None
        leaf = (cut(x) * size).requires_grad_()
        first(leaf)[0].backward(dbetween.chunk(tp, -1)[rank] * size)
        middle = (between.chunk(tp, -1)[rank] * size).contiguous().requires_grad_()
        y, _ = second(middle)
        y.backward(cut(dy) * size)
        update_delayed_scales([torch.nn.ModuleList([first, second])])
    return {"y": y.detach(), "dx": leaf.grad, "dw1": first.weight.grad, "dw2": second.weight.grad}
