"""A model with quantized weights gives the same text in every layout, and that of the values that it stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.inference.quantization import Quantized, quantize_weights
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel.quantized_weight import QuantizedWeight
from tests.unit_tests.inference.small_models import (
    LATENT,
    LLAMA,
    build_engine,
    build_model,
    whole_logits,
)
from tests.unit_tests.inference.test_decoding import build_model as build_hybrid
from tests.worker_pool import run_ranks

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5]]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=10)
WIDE = {"hidden_size": 64, "ffn_hidden_size": 128}  # rows of two ranks are whole groups of int4
SETTINGS = {"llama": LLAMA | WIDE, "experts": LLAMA | WIDE | {"num_moe_experts": 4}, "latents": LATENT}


def continuations(layout: tuple, settings: dict[str, Any], kind: str) -> tuple[list, Quantized]:
    model = build_model(*layout, **settings)
    report = quantize_weights([model], kind)
    return [request.generated_tokens for request in build_engine(model).generate(PROMPTS, GREEDY)], report


def with_stored_values(model: nn.Module) -> None:
    """Put the stored values in the place of what stores them."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "weight", None), QuantizedWeight):
            module.weight = nn.Parameter(module._modules.pop("weight").dequantized())


def by_hand(settings: dict[str, Any], kind: str) -> None:
    model = build_model(**settings)
    before = whole_logits(model, PROMPTS[0])
    report = quantize_weights([model], kind)
    stored = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    assert report.layers == len(stored) > 0
    assert report.bytes_after == sum(module.nbytes for module in stored) < report.bytes_before / 3
    found = whole_logits(model, PROMPTS[0])
    with_stored_values(model)
    torch.testing.assert_close(found, whole_logits(model, PROMPTS[0]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_logits_are_those_of_the_stored_values(kind: str) -> None:
    run_ranks(1, by_hand, SETTINGS["experts"], kind)


def test_latents_are_projected_by_the_stored_values() -> None:
    texts, _ = run_ranks(1, continuations, (), SETTINGS["latents"], "int8")[0]
    assert texts == run_ranks(1, of_stored_values, SETTINGS["latents"], "int8")[0]


def of_stored_values(settings: dict[str, Any], kind: str) -> list:
    model = build_model(**settings)
    quantize_weights([model], kind)
    with_stored_values(model)
    return [request.generated_tokens for request in build_engine(model).generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    ("kind", "layout"), [("int8", (2, 1)), ("int4", (2, 1, True)), ("fp8", (2, 1)), ("int8", (1, 2))], ids=str
)
def test_text_does_not_depend_on_the_layout(kind: str, layout: tuple) -> None:
    expected, alone = run_ranks(1, continuations, (), SETTINGS["llama"], kind)[0]
    for texts, report in run_ranks(2, continuations, layout, SETTINGS["llama"], kind):
        assert texts == expected
        assert report.bytes_before == alone.bytes_before / 2


def hybrid() -> None:
    model = build_hybrid(1, 1, False, MambaModel)
    assert quantize_weights([model], "int8").layers == 2 * 2 + 2 + 2  # two mixers, attention, one MLP
    (request,) = build_engine(model, max_sequence_length=24).generate(PROMPTS[:1], GREEDY)
    assert len(request.generated_tokens) == 10


def test_mixers_too() -> None:
    run_ranks(1, hybrid)


def refusal(settings: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weights([build_model(**LLAMA, **settings)], kind)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({}, "int3", "int8, int4, fp8"),
        ({"num_moe_experts": 2, "moe_grouped_gemm": True}, "int8", "moe-grouped-gemm"),
        ({"fp8": "e4m3", "fp8_recipe": "tensorwise"}, "int8", "leave --fp8-format out"),
        ({"ffn_hidden_size": 80}, "int4", r"layers.0.mlp.linear_fc2: .*multiples of 32"),
    ],
)
def test_what_cannot_be_quantized_is_refused(settings: dict[str, Any], kind: str, message: str) -> None:
    run_ranks(1, refusal, settings, kind, message)
