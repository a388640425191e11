"""A small DeepSeek-V3 (latent attention, YaRN, a dense first layer, experts in groups with a bias and a shared one)
against that of transformers: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import set_initialization_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig

S, B, H, VOCAB, LAYERS, EXPERTS, WIDTH = 12, 2, 32, 64, 3, 8, 24
ATTENTION = {
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_q_proj": "q_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}


def ours(q_lora_rank: int | None, grouped: bool) -> GPTModel:
    config = MLATransformerConfig(
        num_layers=LAYERS,
        hidden_size=H,
        num_attention_heads=4,
        ffn_hidden_size=48,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        rotary_scaling_factor=4.0,
        max_position_embeddings=8,
        mscale=1.0,
        mscale_all_dim=1.0,
        qk_layernorm=True,
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
        gradient_accumulation_fusion=False,
        num_moe_experts=EXPERTS,
        moe_layer_freq=[0, 1, 1],
        moe_ffn_hidden_size=WIDTH,
        moe_shared_expert_intermediate_size=WIDTH,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_grouped_gemm=grouped,
    )
    set_initialization_seed(3)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(config, spec, VOCAB, S, position_embedding_type="rope")
    for layer in model.decoder.layers[1:]:
        generator = torch.Generator().manual_seed(layer.layer_number)
        layer.mlp.router.expert_bias.copy_(0.1 * torch.randn(EXPERTS, generator=generator))
    return model


def theirs(q_lora_rank: int | None) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=H,
        intermediate_size=48,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=EXPERTS,
        routed_scaling_factor=2.5,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        max_position_embeddings=32,
        rope_parameters=rope,
        num_mtp_layers=0,
        attn_implementation="eager",
    )
    return DeepseekV3ForCausalLM(config).eval()


def by_their_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours (weights or gradients, of experts one after the other) under their names."""
    found = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
        "lm_head.weight": tensors["output_layer.weight"],
    }
    for n in range(LAYERS):
        here, there = f"decoder.layers.{n}.", f"model.layers.{n}."
        found[f"{there}input_layernorm.weight"] = tensors[f"{here}input_layernorm.weight"]
        found[f"{there}post_attention_layernorm.weight"] = tensors[f"{here}pre_mlp_layernorm.weight"]
        for name, other in ATTENTION.items():
            if (weight := tensors.get(f"{here}self_attention.{name}.weight")) is not None:
                found[f"{there}self_attn.{other}.weight"] = weight
        dense, shared = f"{here}mlp.linear_fc", f"{here}mlp.shared_experts.linear_fc"
        first, block = (dense, "mlp.") if n == 0 else (shared, "mlp.shared_experts.")
        gate, up = tensors[f"{first}1.weight"].chunk(2)
        found |= {f"{there}{block}gate_proj.weight": gate, f"{there}{block}up_proj.weight": up}
        found[f"{there}{block}down_proj.weight"] = tensors[f"{first}2.weight"]
        if n > 0:
            found[f"{there}mlp.gate.weight"] = tensors[f"{here}mlp.router.weight"]
            for kind, other in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                parts = [tensors[f"{here}mlp.experts.local_experts.{e}.{kind}.weight"] for e in range(EXPERTS)]
                found[f"{there}mlp.experts.{other}"] = torch.stack(parts)
    return found


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_logits_and_gradients_are_those_of_transformers(q_lora_rank: int | None) -> None:
    pytest.importorskip("transformers")
    model, other = ours(q_lora_rank, grouped=False), theirs(q_lora_rank)
    weights = by_their_names({name: param.detach() for name, param in model.named_parameters()})
    for n, layer in enumerate(model.decoder.layers):
        if n > 0:
            weights[f"model.layers.{n}.mlp.gate.e_score_correction_bias"] = layer.mlp.router.expert_bias
    other.load_state_dict(weights)
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
    logits = model(ids, torch.arange(S).expand(B, S), None)
    expected = other(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    targets = ids.roll(-1, 1).flatten()
    cross_entropy(logits.flatten(0, 1), targets).backward()
    cross_entropy(expected.flatten(0, 1), targets).backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    of_theirs = {name: param.grad for name, param in other.named_parameters()}
    for name, grad in by_their_names(gradients).items():
        torch.testing.assert_close(grad, of_theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_stack_of_experts_computes_the_same() -> None:
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S).expand(B, S)
    with torch.no_grad():
        expected = ours(24, grouped=False)(ids, positions, None)
        torch.testing.assert_close(ours(24, grouped=True)(ids, positions, None), expected, rtol=0, atol=1e-5)
