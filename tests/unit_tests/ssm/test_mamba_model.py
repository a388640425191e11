"""Whole models: names and shapes, equality of ways to compute them, and text token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import MambaLayer, MambaMixer
from megatron.core.transformer.transformer_config import TransformerConfig

HYBRID = "M*-M"
VOCABULARY = 40


def config(pattern: str = HYBRID, **options: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": len(pattern),
        "hidden_size": 16,
        "num_attention_heads": 4,
        "mamba_head_dim": 8,
        "mamba_num_groups": 2,
        "mamba_state_dim": 6,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
        "is_hybrid_model": True,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(values | options))


def model(pattern: str = HYBRID, position: Any = "none", **options: Any) -> MambaModel:
    torch.manual_seed(3)
    made = MambaModel(
        config(pattern, **options),
        mamba_stack_spec,
        VOCABULARY,
        64,
        hybrid_override_pattern=pattern,
        position_embedding_type=position,
    )
    return made.double()


def tokens(length: int = 21, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    return ids, torch.arange(length).expand(rows, -1)


def loss_and_gradients(of: MambaModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids, positions = tokens()
    of.zero_grad()
    loss = of(ids, positions, None, labels=ids).mean()
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in of.named_parameters() if param.grad is not None}


def test_parameters_have_the_public_names_and_shapes() -> None:
    h, di, gs, heads = 16, 32, 12, 4
    found = {name: tuple(p.shape) for name, p in model("M").named_parameters()}
    layer = "decoder.layers.0."
    assert found == {
        "embedding.word_embeddings.weight": (VOCABULARY, h),
        f"{layer}norm.weight": (h,),
        f"{layer}mixer.in_proj.weight": (2 * di + 2 * gs + heads, h),
        f"{layer}mixer.conv1d.weight": (di + 2 * gs, 1, 4),
        f"{layer}mixer.conv1d.bias": (di + 2 * gs,),
        f"{layer}mixer.dt_bias": (heads,),
        f"{layer}mixer.A_log": (heads,),
        f"{layer}mixer.D": (heads,),
        f"{layer}mixer.norm.weight": (di,),
        f"{layer}mixer.out_proj.weight": (h, di),
        "decoder.final_norm.weight": (h,),
        "output_layer.weight": (VOCABULARY, h),
    }


def test_keys_in_a_checkpoint() -> None:
    sharded = model().sharded_state_dict()
    keys = {part.key for value in sharded.values() for part in _parts(value)}
    mixer = "decoder.layers.3.mixer."
    assert {f"{mixer}in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")} <= keys
    assert {f"{mixer}conv1d.{kind}.{part}" for kind in ("weight", "bias") for part in ("x", "B", "C")} <= keys
    assert {f"{mixer}in_proj.layer_norm_weight", f"{mixer}A_log", "decoder.final_norm.weight"} <= keys
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in keys


def _parts(value: Any) -> list[Any]:
    return value.build() if hasattr(value, "build_fn") else [value] if hasattr(value, "key") else []


def test_initial_values() -> None:
    torch.manual_seed(1)
    mixer = model("M", mamba_num_heads=400, mamba_head_dim=2).decoder.layers[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.9e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.11
    decay = mixer.A_log.exp()
    assert 1 <= decay.min() < 1.5 and 15 < decay.max() <= 16
    assert mixer.D.eq(1).all() and mixer.conv1d.weight.abs().max() <= 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"use_mamba_mem_eff_path": False},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]},
    ],
    ids=["stored", "layers recomputed", "parts recomputed"],
)
def test_ways_to_save_memory_change_no_number(options: dict[str, Any]) -> None:
    expected, gradients = loss_and_gradients(model())
    loss, found = loss_and_gradients(model(**options))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12)


def test_later_tokens_have_no_influence() -> None:
    of, (ids, positions) = model(), tokens()
    whole, part = of(ids, positions, None), of(ids[:, :10], positions[:, :10], None)
    torch.testing.assert_close(whole[:, :10], part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["MM", "M*-M", "*M"])
@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("prompt", [1, 2, 13])
def test_text_token_by_token_is_the_whole_forward(pattern: str, position: str, prompt: int) -> None:
    of, (ids, positions) = model(pattern, position).eval(), tokens()
    with torch.no_grad():
        expected = of(ids, positions, None)
        context = StaticInferenceContext(2, ids.size(1))
        parts, start = [], 0
        for end in range(prompt, ids.size(1) + 1):
            parts.append(of(ids[:, start:end], positions[:, start:end], None, inference_context=context))
            context.increment_sequence_len_offset(end - start)
            start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-11)


def test_states_before_the_first_token() -> None:
    """A step from the allocated states is what a prompt of one token gives."""
    of = model("M").decoder.layers[0]
    assert isinstance(of, MambaLayer) and isinstance(of.mixer, MambaMixer)
    hidden = torch.randn(1, 2, 16, dtype=torch.float64)
    conv, ssm = of.allocate_inference_cache(2, 10, torch.float64)
    assert conv.shape == (2, 56, 4) and ssm.shape == (2, 4, 8, 6) and ssm.dtype == torch.float32
    stepped = of.mixer.step(hidden, conv, ssm.double())[0]
    torch.testing.assert_close(stepped, of.mixer(hidden)[0])


def test_variants_of_the_mixer() -> None:
    """Arguments that no flag sets change what is computed as they say."""
    spec = mamba_stack_spec.submodules.mamba_layer.submodules.mixer.submodules
    hidden = torch.randn(9, 2, 16)

    def output(**options: Any) -> Tensor:
        torch.manual_seed(3)
        return MambaMixer(config("M"), spec, 16, **options)(hidden)[0]

    plain = output()
    torch.testing.assert_close(output(chunk_size=2), plain)
    torch.testing.assert_close(output(D_has_hdim=True), plain)
    for changed in ({"rmsnorm": False}, {"norm_before_gate": True}, {"A_init_range": (2, 3)}, {"conv_init": 0.01}):
        assert not torch.allclose(output(**changed), plain)


def test_experts_among_the_layers() -> None:
    options = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_topk": 2}
    loss, gradients = loss_and_gradients(model("ME", **options))
    assert torch.isfinite(loss) and any("experts" in name for name in gradients)
    with pytest.raises(ValueError, match=r"'MM' have 0 mixtures of experts \(E\) for num_moe_experts \(4\)"):
        model("MM", **options)
    with pytest.raises(ValueError, match="'ME' have 1 mixtures"):
        model("ME")


def test_packed_sequences_are_refused() -> None:
    ids, positions = tokens()
    packed = PackedSeqParams.from_documents(ids, 0)
    with pytest.raises(NotImplementedError, match="state"):
        model()(ids, positions, None, packed_seq_params=packed)
