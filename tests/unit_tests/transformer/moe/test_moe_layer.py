"""The layer against a sum over experts written out, for every dispatcher, on ranks that split experts in every way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron.core.tensor_parallel.initialization import deferred_initialization, initialize_parameters
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

S, B, H, F, E = 8, 2, 16, 24, 4
PARTS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def config(**options: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": H,
        "num_attention_heads": 4,
        "num_moe_experts": E,
        "moe_ffn_hidden_size": F,
        "moe_router_topk": 2,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "params_dtype": torch.float64,
        "init_method_std": 0.4,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**values | options)


def layer(config: TransformerConfig, gate: bool = False) -> MoELayer:
    """A layer whose values depend on names and positions alone."""
    experts: Any = GroupedMLP if config.moe_grouped_gemm else ModuleSpec(module=SequentialMLP, submodules=PARTS)
    shared = ModuleSpec(module=SharedExpertMLP, params={"gate": gate}, submodules=PARTS)
    with deferred_initialization():
        made = MoELayer(config, MoESubmodules(experts, shared), layer_number=1)

    def global_name(name: str) -> str:
        head, found, rest = name.partition("local_experts.")
        if not found:
            return name
        index, _, tail = rest.partition(".")
        return f"{head}{found}{made.local_expert_indices[int(index)]}.{tail}"

    initialize_parameters(made, global_name, seed=7)
    return made


def hidden_states() -> Tensor:
    return torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def written_out(made: MoELayer, x: Tensor) -> Tensor:
    """The layer's output, expert by expert and token by token, from the weights of a layer on one rank."""
    weights, chosen = made.router(x)
    tokens = x.reshape(-1, H)
    rows = []
    for token, of_token, its_experts in zip(tokens, weights, chosen):
        total = torch.zeros(H, dtype=x.dtype)
        for expert in its_experts.nonzero().flatten().tolist():
            mlp = made.experts.local_experts[expert]
            gate, up = (mlp.linear_fc1.weight @ token).chunk(2)
            total = total + of_token[expert] * (mlp.linear_fc2.weight @ (silu(gate) * up))
        rows.append(total)
    output = torch.stack(rows).view_as(x)
    return output if made.shared_experts is None else output + made.shared_experts(x)


def reference(**options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(output, gradient of the input, gradients of the weights) on one rank, of experts one after the other."""
    made = layer(config(**options))
    x = hidden_states().requires_grad_()
    output = written_out(made, x)
    output.square().sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"moe_router_score_function": "sigmoid", "moe_router_topk": 3, "moe_router_topk_scaling_factor": 2.0},
    {"moe_shared_expert_intermediate_size": 20},
    {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    {"moe_expert_capacity_factor": 0.5},
    {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True, "moe_token_drop_policy": "position"},
]


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "softmax")
def test_one_rank(options: dict[str, Any], dispatcher: str, grouped: bool) -> None:
    expected, expected_dx, expected_dw = reference(**options)
    made = layer(config(moe_token_dispatcher_type=dispatcher, moe_grouped_gemm=grouped, **options))
    x = hidden_states().requires_grad_()
    output, bias = made(x)
    output.square().sum().backward()
    assert bias is None and x.grad is not None
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_dx, rtol=1e-10, atol=1e-10)
    for name, grad in gradients(made).items():
        torch.testing.assert_close(grad, expected_dw.get(name, torch.zeros_like(grad)), rtol=1e-10, atol=1e-10)


def gradients(made: MoELayer) -> dict[str, Tensor]:
    """Of every weight, by the names of experts one after the other (counted over all ranks)."""
    found: dict[str, Tensor] = {}
    for name, param in made.named_parameters():
        assert param.grad is not None, name
        members = param.init_spec.stacked
        if members:
            found |= {f"experts.{member}": grad for member, grad in zip(members, param.grad)}
            continue
        head, local, rest = name.partition("local_experts.")
        if local:
            index, _, tail = rest.partition(".")
            name = f"{head}{local}{made.local_expert_indices[int(index)]}.{tail}"
        found[name] = param.grad
    return found


def check_ranks(ep: int, etp: int, tp: int, options: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    world = max(ep * etp, tp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    made = layer(
        config(
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            **options,
        )
    )
    # Ranks have the tokens of one sample after the other (data parallel) or of parts of a sequence.
    rank = torch.distributed.get_rank()
    whole = hidden_states().reshape(-1, B, H)
    part = slice(rank * S // world, (rank + 1) * S // world)
    x = whole[part].clone().requires_grad_()
    output, _ = made(x)
    output.square().sum().backward()
    alone = {
        name: value for name, value in options.items() if name not in ("moe_token_dispatcher_type", "moe_grouped_gemm")
    }
    parallel_state.destroy_model_parallel()
    expected, expected_dx, expected_dw = reference(**alone)
    torch.testing.assert_close(output, expected[part], rtol=1e-12, atol=1e-12)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected_dx[part], rtol=1e-10, atol=1e-10)
    if etp == 1 and ep == world:  # an expert is on one rank, whose gradient is that of all tokens
        for name, grad in gradients(made).items():
            if ".local_experts." in name:
                torch.testing.assert_close(grad, expected_dw[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("ep", "etp", "tp", "options"),
    [
        (2, 1, 1, {"moe_token_dispatcher_type": "alltoall"}),
        (2, 1, 1, {"moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": True}),
        (1, 2, 2, {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True}),
        (4, 1, 2, {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_intermediate_size": 20}),
        (2, 2, 2, {"moe_token_dispatcher_type": "alltoall"}),
        (2, 2, 2, {"moe_token_dispatcher_type": "allgather"}),
        (2, 2, 4, {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True, "moe_router_topk": 3}),
    ],
)
def test_ranks_that_split_experts(ep: int, etp: int, tp: int, options: dict[str, Any]) -> None:
    run_ranks(max(ep * etp, tp), check_ranks, ep, etp, tp, options)


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_memory_kept_for_backward(grouped: bool) -> None:
    """Of n tokens the input (h), of the experts' m rows the input (h), the products of gate and up (2f), what comes of
    them (f), and that times the weight (f); nothing of the experts' outputs. Besides, places and weights of rows."""
    options = {"moe_token_dispatcher_type": "alltoall", "bias_activation_fusion": True}
    made = layer(config(moe_grouped_gemm=grouped, **options))
    x, kept = hidden_states().requires_grad_(), dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = made(x)
    n, m = S * B, S * B * 2
    computed = 8 * (n * H + m * (H + 4 * F))
    beside = 8 * (3 * m + 4 * n * E)
    found = sum(size for place, size in kept.items() if place not in weights)
    assert computed <= found <= computed + beside, (found, computed)
    assert output.shape == x.shape


def test_shared_experts_while_tokens_travel() -> None:
    run_ranks(2, check_shared_experts_while_tokens_travel)


def check_shared_experts_while_tokens_travel() -> None:
    """The same to the bit, gradients included."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    options = {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_intermediate_size": 20}
    found = []
    for more in ({}, {"moe_shared_expert_overlap": True}):
        made = layer(config(expert_model_parallel_size=2, moe_shared_expert_gate=True, **options, **more))
        x = hidden_states()[torch.distributed.get_rank() :: 2].clone().requires_grad_()
        output, _ = made(x)
        output.square().sum().backward()
        found.append({"output": output, "x": x.grad, **gradients(made)})
    parallel_state.destroy_model_parallel()
    assert found[0].keys() == found[1].keys() and "shared_experts.gate_weight" in found[0]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items() if value is not None)


def test_experts_without_tokens_and_one_with_all() -> None:
    """Everything goes to the first two experts; the others get gradients of zero, not none."""
    for grouped in (False, True):
        made = layer(config(moe_grouped_gemm=grouped, moe_token_dispatcher_type="alltoall"))
        with torch.no_grad():
            made.router.weight.zero_()
            made.router.weight[:2] = 1.0
        output, _ = made(hidden_states().abs())
        output.sum().backward()
        found = gradients(made)
        assert found["experts.local_experts.0.linear_fc1.weight"].abs().sum() > 0
        assert found["experts.local_experts.3.linear_fc1.weight"].abs().sum() == 0


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_a_rank_whose_experts_get_no_token(dispatcher: str) -> None:
    run_ranks(2, check_a_rank_whose_experts_get_no_token, dispatcher)


def check_a_rank_whose_experts_get_no_token(dispatcher: str) -> None:
    """All tokens of both ranks go to the two experts of the first one; stacked and one after the other."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    for grouped in (False, True):
        made = layer(
            config(expert_model_parallel_size=2, moe_grouped_gemm=grouped, moe_token_dispatcher_type=dispatcher)
        )
        with torch.no_grad():
            made.router.weight.zero_()
            made.router.weight[:2] = 1.0
        x = hidden_states().abs()[torch.distributed.get_rank() :: 2].requires_grad_()
        output, _ = made(x)
        output.square().sum().backward()
        found = gradients(made)
        sizes = {name: grad.abs().sum().item() for name, grad in found.items() if "linear_fc1" in name}
        assert len(sizes) == 2 and output.abs().sum() > 0
        busy = torch.distributed.get_rank() == 0
        assert all((size > 0) == busy for size in sizes.values()), sizes
    parallel_state.destroy_model_parallel()


def noise_of_tokens() -> Tensor:
    """What this tensor parallel rank's tokens are multiplied by within the layers of a block."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlock

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(5)
    options = {"moe_input_jitter_eps": 0.1, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    made = layer(config(tensor_model_parallel_size=2, sequence_parallel=True, **options))
    with TransformerBlock._dropout_rng(SimpleNamespace(training=True, config=made.config)):  # type: ignore[arg-type]
        noise = made.router.apply_input_jitter(torch.ones(6, H))
    parallel_state.destroy_model_parallel()
    return noise


def test_ranks_with_other_tokens_draw_other_noise() -> None:
    first, second = run_ranks(2, noise_of_tokens)
    assert not torch.equal(first, second)


def test_the_bias_of_experts_stays_in_fp32_when_the_model_is_cast() -> None:
    made = layer(
        config(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, params_dtype=torch.float32)
    )
    made.router.expert_bias += 1.001
    made.bfloat16()
    assert made.router.weight.dtype == torch.bfloat16
    assert made.router.expert_bias.dtype == made.router.local_tokens_per_expert.dtype == torch.float32
    assert made.router.expert_bias[0].item() == pytest.approx(1.001, abs=1e-6)
    assert "router.expert_bias" in made.state_dict()


def test_recomputed_activations_change_nothing() -> None:
    x = hidden_states()
    found = []
    for more in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}):
        made = layer(config(moe_grouped_gemm=True, **more)).train()
        source = x.clone().requires_grad_()
        made(source)[0].square().sum().backward()
        found.append({"x": source.grad, **{name: param.grad for name, param in made.named_parameters()}})
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())
