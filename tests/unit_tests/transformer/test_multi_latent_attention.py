"""Latent attention against that of transformers, step by step against all at once, recomputed against stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import deferred_initialization, initialize_parameters, set_initialization_seed
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from tests.worker_pool import run_ranks

S, B, H, HEADS = 12, 2, 32, 4
SIZES = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 12}
YARN = {"rotary_scaling_factor": 4.0, "max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 0.7}


def config(**options: Any) -> MLATransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": H,
        "num_attention_heads": HEADS,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-6,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_scaling_factor": 1.0,
        "params_dtype": torch.float64,
        "init_method_std": 0.3,
        "gradient_accumulation_fusion": False,
    }
    return MLATransformerConfig(**values | SIZES | options)


def attention(config: MLATransformerConfig) -> MLASelfAttention:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, multi_latent_attention=True)
    with deferred_initialization():
        made = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    initialize_parameters(made, seed=3)
    return made


def hidden_states() -> Tensor:
    return torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


NAMES = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}


def theirs(made: MLASelfAttention, config: MLATransformerConfig) -> Any:
    """The same layer of transformers, and the cos and sin that it takes."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    rope: dict[str, Any] = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rotary_scaling_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": config.rotary_scaling_factor,
            "original_max_position_embeddings": config.max_position_embeddings,
            "mscale": config.mscale,
            "mscale_all_dim": config.mscale_all_dim,
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
        }
    settings = deepseek.DeepseekV3Config(
        hidden_size=H,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_head_dim,
        qk_rope_head_dim=config.qk_pos_emb_head_dim,
        v_head_dim=config.v_head_dim,
        max_position_embeddings=64,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    layer = deepseek.DeepseekV3Attention(settings, 0).double().eval()
    state = {name: value for name, value in made.state_dict().items() if isinstance(value, Tensor)}
    layer.load_state_dict({f"{NAMES[name.split('.')[0]]}.weight": value for name, value in state.items()})
    positions = deepseek.DeepseekV3RotaryEmbedding(settings)(
        torch.zeros(1, dtype=torch.float64), torch.arange(S).expand(B, S)
    )
    return layer, positions


@pytest.mark.parametrize(
    "options",
    [{}, YARN, {"q_lora_rank": None}, {"attention_backend": AttnBackend.unfused, **YARN}, {"v_head_dim": 6}],
    ids=str,
)
def test_output_and_gradients_are_those_of_transformers(options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    made = attention(config(**options))
    layer, positions = theirs(made, made.config)
    x, y = hidden_states().requires_grad_(), hidden_states().transpose(0, 1).contiguous().requires_grad_()
    output, bias = made(x, None)
    causal = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = layer(y, positions, causal)[0]
    assert bias is None
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=0, atol=1e-5)  # their angles are fp32
    upstream = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    output.backward(upstream.transpose(0, 1))
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad.transpose(0, 1), rtol=0, atol=1e-4)
    for name, param in made.named_parameters():
        other = layer.get_parameter(f"{NAMES[name.split('.')[0]]}.weight").grad
        torch.testing.assert_close(param.grad, other, rtol=1e-4, atol=1e-4, msg=name)


def test_the_scale_of_scores_and_its_default() -> None:
    """Facts of the public configuration: 128 + 64 channels, factor 40, mscale 0.707."""
    made = attention(config(**{**YARN, "rotary_scaling_factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}))
    assert made.scale_of_scores() == pytest.approx(0.114721 * (128 + 64) ** 0.5 / (8 + 4) ** 0.5, rel=1e-5)
    assert attention(config(softmax_scale=0.25)).core_attention.softmax_scale == 0.25


@pytest.mark.parametrize(
    "options", [YARN, {"q_lora_rank": None, "qk_layernorm": False, "window_size": (3, 0)}], ids=str
)
def test_texts_written_step_by_step(options: dict[str, Any]) -> None:
    """A prompt, then tokens one by one and two at a time, in latent space: the logits of the whole text."""
    set_initialization_seed(5)
    model = GPTModel(
        config(**options),
        get_gpt_layer_local_spec(qk_layernorm=options.get("qk_layernorm", True), multi_latent_attention=True),
        vocab_size=64,
        max_sequence_length=S,
        position_embedding_type="rope",
    ).eval()
    ids = torch.randint(64, (B, S), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S).expand(B, S)
    context = StaticInferenceContext(max_batch_size=B, max_sequence_length=S)
    with torch.no_grad():
        expected = model(ids, positions, None)
        found, start = [], 0
        for count in (5, 1, 1, 2, 3):
            part = slice(start, start + count)
            found.append(model(ids[:, part], positions[:, part], None, inference_context=context))
            context.increment_sequence_len_offset(count)
            start += count
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-11)
    for keys, values in context.key_value_memory_dict.values():
        assert values is keys and keys.shape == (B, 1, S, SIZES["kv_lora_rank"] + SIZES["qk_pos_emb_head_dim"])


@pytest.mark.parametrize("modules", [["mla_up_proj"], ["mla_up_proj", "core_attn", "layernorm"]])
@pytest.mark.parametrize("options", [YARN, {"q_lora_rank": None, "v_head_dim": 6}], ids=str)
def test_recomputed_up_projections_change_nothing(modules: list[str], options: dict[str, Any]) -> None:
    def gradients(**more: Any) -> dict[str, Tensor]:
        made = attention(config(**options, **more)).train()
        x = hidden_states().requires_grad_()
        made(x, None)[0].square().sum().backward()
        return {"x": x.grad, **{name: param.grad for name, param in made.named_parameters()}}  # type: ignore[dict-item]

    expected = gradients()
    found = gradients(recompute_granularity="selective", recompute_modules=modules)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_packed_sequences_are_sequences() -> None:
    made = attention(config(**YARN))
    x = hidden_states()
    borders = torch.tensor([0, 5, 12, 15, 24], dtype=torch.int32)
    packed = PackedSeqParams("thd", borders, borders, is_cut_by_sample=True)
    together, _ = made(x, None, packed_seq_params=packed)
    for sample, parts in enumerate([[(0, 5), (5, 12)], [(0, 3), (3, 12)]]):
        for start, stop in parts:
            alone, _ = made(x[start:stop, sample : sample + 1], None)
            torch.testing.assert_close(together[start:stop, sample : sample + 1], alone, rtol=0, atol=1e-12)


def on_ranks(sequence_parallel: bool, norms: bool) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, int]]]:
    """(output, gradient of the input, gradients of the parameters and where they are cut), of this rank."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    made = attention(config(**YARN, **layout, qk_layernorm=norms))
    rank = parallel_state.get_tensor_model_parallel_rank()
    rows = slice(rank * S // 2, (rank + 1) * S // 2) if sequence_parallel else slice(None)
    x = hidden_states()[rows].requires_grad_()
    output, _ = made(x, None)
    (output * upstream()[rows]).sum().backward()
    grads = {
        name: (param.grad, param.partition_dim if param.tensor_model_parallel else -1)  # type: ignore[attr-defined]
        if hasattr(param, "tensor_model_parallel")
        else (param.grad, -1)
        for name, param in made.named_parameters()
    }
    return output.detach(), x.grad, grads  # type: ignore[return-value]


def upstream() -> Tensor:
    return torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_heads_on_two_ranks(sequence_parallel: bool, norms: bool) -> None:
    bound = 1e-5  # kernels of the backward pass compute in fp32
    made = attention(config(**YARN, qk_layernorm=norms))
    x = hidden_states().requires_grad_()
    output, _ = made(x, None)
    (output * upstream()).sum().backward()
    one, two = run_ranks(2, on_ranks, sequence_parallel, norms)
    joined = (lambda i: torch.cat((one[i], two[i]))) if sequence_parallel else (lambda i: two[i])
    torch.testing.assert_close(joined(0), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(joined(1), x.grad, rtol=0, atol=bound)
    for name, param in made.named_parameters():
        (mine, dim), (other, _) = one[2][name], two[2][name]
        whole = torch.cat((mine, other), dim) if dim >= 0 else mine + other if sequence_parallel else mine
        torch.testing.assert_close(whole, param.grad, rtol=bound, atol=10 * bound, msg=name)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"q_lora_rank \(24\) must be divisible by tensor_model_parallel_size \(5\)"):
        config(tensor_model_parallel_size=5, num_attention_heads=5, hidden_size=40, ffn_hidden_size=40)
    with pytest.raises(ValueError, match="no groups of heads"):
        config(num_query_groups=2)
    with pytest.raises(ValueError, match="qk_pos_emb_head_dim .3. must be even"):
        config(qk_pos_emb_head_dim=3)
    with pytest.raises(ValueError, match="kv_lora_rank .0. must be positive"):
        config(kv_lora_rank=0)
    with pytest.raises(ValueError, match="no norm of heads"):
        get_gpt_layer_local_spec(multi_latent_attention=True, qk_l2_norm=True)
    made = attention(config())
    with pytest.raises(ValueError, match="hand in the angles of their positions"):
        made(hidden_states(), None, inference_context=StaticInferenceContext(B, S))
    assert made.attn_mask_type is AttnMaskType.causal
