"""A random Mamba-2 of transformers and ours with its weights: equal logits, any layout; and the way back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.export import (
    DictState,
    HFFolder,
    HFState,
    Joined,
    ModelShape,
    NotExpressible,
    load_whole_state,
    to_hf,
)
from megatron.core.export.families.mamba2 import MAMBA2
from megatron.core.export.mixer_parts import InParts
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, VOCAB = 3, 64, 96
SETTINGS = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 8, "normalization": "RMSNorm"}
SETTINGS |= {"mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 24}


def hf_model() -> Any:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        num_heads=8,
        head_dim=16,
        hidden_size=HIDDEN,
        state_size=24,
        n_groups=2,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        chunk_size=16,
    )
    model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape))
    return model


def our_logits(tp: int, folder: Path, ids: Tensor) -> Tensor:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = TransformerConfig(**SETTINGS, tensor_model_parallel_size=tp)
    model = MambaModel(config, mamba_stack_spec, VOCAB, 64).eval()
    load_whole_state(model, HFState(HFFolder(folder)))
    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(model(ids, None, None))


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_equal_logits(tmp_path: Path, tp: int) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    for found in run_ranks(tp, our_logits, tp, tmp_path, ids):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # logits of size 3


def test_there_and_back(tmp_path: Path) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    folder = HFFolder(tmp_path)
    settings = folder.settings()
    shape = ModelShape.of_settings(settings)
    state = HFState(folder)
    ours = {name: state.read(name) for name in state}
    parted = Joined(InParts(DictState(ours)))  # as a sharded checkpoint has it
    back = to_hf(MAMBA2.weights(shape), {name: parted.read(name) for name in parted})
    expected = theirs.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    written, read = MAMBA2.config(settings, VOCAB), folder.config
    assert {name: value for name, value in written.items() if read[name] != value} in ({}, {"residual_in_fp32": False})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hybrid_override_pattern": "M*M"}, r"the layers are M\*M"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"mamba_num_heads": 6}, "96 channels of a mixer are no multiple of hidden_size 64"),
    ],
)
def test_what_it_has_no_class_for(changed: dict[str, Any], message: str) -> None:
    settings = {**MAMBA2.fixed, **SETTINGS, **changed}
    with pytest.raises(NotExpressible, match=message):
        MAMBA2.config(settings, VOCAB)


def test_time_steps_with_limits_are_refused() -> None:
    config = hf_model().config.to_dict() | {"time_step_limit": [0.0, 0.1]}
    with pytest.raises(NotExpressible, match="time_step_limit"):
        MAMBA2.settings(config)
