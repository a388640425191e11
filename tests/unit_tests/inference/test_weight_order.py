"""Weights in the order in which a CPU reads them give what they gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.weight_order import order_weights
from megatron.core.tensor_parallel.stored_weight import PackedWeight, can_pack
from tests.unit_tests.inference.small_models import LATENT, LLAMA, build_engine, build_model, whole_logits
from tests.worker_pool import run_ranks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=10)
SETTINGS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "gelu fused": {"bias_activation_fusion": True},
    "experts": LLAMA | {"num_moe_experts": 4},
    "latents": LATENT,
}


def texts(layout: tuple, settings: dict[str, Any], ordered: bool) -> list:
    model = build_model(*layout, **settings)
    if ordered:
        order_weights([model])
        assert layout or not model.share_embeddings_and_output_weights
        packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
        is_fused = settings.get("bias_activation_fusion", False) and can_pack(torch.empty(1))
        assert any(weight.applies_gelu for weight in packed) == is_fused
    return [request.generated_tokens for request in build_engine(model).generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_same_texts(settings: dict[str, Any]) -> None:
    assert run_ranks(1, texts, (), settings, True) == run_ranks(1, texts, (), settings, False)


def test_the_same_texts_on_four_ranks() -> None:
    expected = run_ranks(1, texts, (), SETTINGS["learned positions"], False) * 4
    assert run_ranks(4, texts, (2, 2), SETTINGS["learned positions"], True) == expected


def bf16_logits() -> None:
    model = build_model(bf16=True, params_dtype=torch.bfloat16, **LLAMA).to(torch.bfloat16)
    expected = whole_logits(model, PROMPTS[0])
    order_weights([model])
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == (4 * 4 + 1 if can_pack(torch.empty(1, dtype=torch.bfloat16)) else 0)
    found = whole_logits(model, PROMPTS[0])
    assert ((found - expected).norm() / expected.norm()) < 2e-2


def test_bf16_within_its_precision() -> None:
    run_ranks(1, bf16_logits)
