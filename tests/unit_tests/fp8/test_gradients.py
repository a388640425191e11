"""Gradients of a whole model in fp8 beside those in fp32: neither longer, nor shorter, nor turned away."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, LENGTH = 256, 64


@cache
def gradients(**fp8: Any) -> dict[str, Tensor]:
    """Of every parameter, on one batch, fp32 weights."""
    config = TransformerConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=160,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **fp8,
    )
    torch.manual_seed(5)
    model = GPTModel(
        config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, position_embedding_type="rope",
        model_comm_pgs=ProcessGroupCollection(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.02)
    ids = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).expand(4, LENGTH)
    model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean().backward()
    return {name: param.grad for name, param in model.named_parameters()}


RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize(("form", "recipe"), [*(("hybrid", recipe) for recipe in RECIPES), ("e4m3", "mxfp8")])
def test_gradients_have_the_length_and_direction_of_fp32(form: str, recipe: str) -> None:
    """A scale that is applied twice, or not at all, is a factor; a wrong operand turns the gradient away."""
    exact, found = gradients(), gradients(fp8=form, fp8_recipe=recipe)
    for name, expected in exact.items():
        length = float(found[name].norm() / expected.norm())
        cosine = float(torch.nn.functional.cosine_similarity(found[name].flatten(), expected.flatten(), 0))
        assert abs(length - 1) < (0.04 if expected.dim() == 2 else 0.1), f"{name}: {length} times as long"
        assert cosine > 0.98, f"{name}: turned away, cosine {cosine}"
    assert any(not torch.equal(found[name], exact[name]) for name in exact), "nothing was rounded to fp8"
