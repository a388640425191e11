"""A model with experts that takes its weights from a dense one in the same process computes what that computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import set_initialization_seed
from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

VOCAB, S, F = 32, 8, 24
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}


def model_of(seed: int, **options: Any) -> GPTModel:
    set_initialization_seed(seed)
    config = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": F,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "params_dtype": torch.float64,
            **options,
        }
    )
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    return GPTModel(config, spec, VOCAB, S).eval()


def logits(model: GPTModel) -> Tensor:
    ids = torch.randint(0, VOCAB, (2, S), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, torch.arange(S).expand(2, -1), None)


def both_logits(dense_options: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(of the dense model, of the one with experts)."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        sizes = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
        parallel_state.initialize_model_parallel(**{name: options[name] for name in sizes if name in options})
    dense, experts = model_of(1, **dense_options), model_of(2, **options)
    state = upcycle_state_dict([experts], [dense])
    experts.load_state_dict(state["model"])
    return logits(dense), logits(experts)


HOW = {
    "one after the other": {"moe_ffn_hidden_size": F},
    "as stacks": {"moe_ffn_hidden_size": F, "moe_grouped_gemm": True},
    "shards": {"moe_ffn_hidden_size": F // 2, "moe_router_topk_scaling_factor": 2.5},
    "stacks of shards": {
        "moe_ffn_hidden_size": F // 2,
        "moe_grouped_gemm": True,
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}


@pytest.mark.parametrize("how", HOW)
def test_it_computes_what_the_dense_model_computes(how: str) -> None:
    expected, found = both_logits({}, {**EXPERTS, **HOW[how]})
    torch.testing.assert_close(found, expected)


def test_each_rank_fills_its_own_experts() -> None:
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    spread = {**EXPERTS, "moe_ffn_hidden_size": F, "expert_model_parallel_size": 2}
    for dense, experts in ((tensor, {**spread, **tensor}), ({}, spread)):
        for expected, found in run_ranks(4, both_logits, dense, experts):
            torch.testing.assert_close(found, expected)


def test_chunks_have_states_of_their_own() -> None:
    options = {**EXPERTS, "moe_ffn_hidden_size": F}
    states = upcycle_state_dict([model_of(2, **options), model_of(3, **options)], [model_of(1), model_of(4)])
    assert list(states) == ["model0", "model1"]
    first, second = (state["decoder.layers.0.self_attention.linear_qkv.weight"] for state in states.values())
    assert not torch.equal(first, second)
    router = "decoder.layers.1.mlp.router.weight"
    assert torch.equal(states["model0"][router], model_of(2, **options).state_dict()[router])


@pytest.mark.parametrize(
    "dense, options, message",
    [
        ({"num_layers": 1}, {}, r"decoder.layers.1.* the dense model does not have it"),
        ({}, {"moe_ffn_hidden_size": 10}, "10 wide, which is no part of the dense block's 24"),
        ({"hidden_size": 32}, {}, r"is \(32, 16\) in the model with experts; the dense model has \(32, 32\)"),
        ({}, {"moe_shared_expert_intermediate_size": 8}, "shared_experts.* no dense block has anything of the kind"),
        ({}, {"qk_layernorm": True}, "q_layernorm.weight is .* the dense model does not have it"),
    ],
)
def test_models_that_do_not_fit(dense: dict[str, Any], options: dict[str, Any], message: str) -> None:
    qk_layernorm = options.pop("qk_layernorm", False)
    experts = model_of(2, **{**EXPERTS, "moe_ffn_hidden_size": F, **options})
    if qk_layernorm:
        experts.decoder.layers[0].self_attention.q_layernorm = torch.nn.LayerNorm(4)
    with pytest.raises(ValueError, match=message):
        upcycle_state_dict([experts], [model_of(1, **dense)])


def test_as_many_chunks_of_both() -> None:
    with pytest.raises(ValueError, match="1 chunks with experts, 2 dense ones"):
        upcycle_state_dict([model_of(1)], [model_of(1), model_of(1)])


def shards_on_two_ranks(**options: Any) -> str:
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    with pytest.raises(ValueError) as error:
        both_logits(tensor, {**EXPERTS, **tensor, **options})
    return str(error.value)


def narrow_experts() -> str:
    return shards_on_two_ranks(moe_ffn_hidden_size=F // 2)


def whole_experts() -> str:
    return shards_on_two_ranks(moe_ffn_hidden_size=F, expert_model_parallel_size=2, expert_tensor_parallel_size=1)


def test_what_would_depend_on_the_layout_is_refused() -> None:
    assert "would differ from layout to layout" in run_ranks(2, narrow_experts)[0]
    assert "make both tensor parallel sizes the same" in run_ranks(2, whole_experts)[0]
