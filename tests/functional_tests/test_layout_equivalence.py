"""The same seed gives the same losses in every parallel layout: fp32, no dropout, 20 steps of a four-layer GPT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.functional_tests.program import pretrain_gpt, train_rows
from tests.worker_pool import run_ranks

STEPS = 20
EXACT = "--attention-dropout 0 --hidden-dropout 0 --train-iters 20 --weight-decay 0.1"

LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "dp2": (2, ""),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2-sp-pp2-dp2-distopt": (
        8,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--use-distributed-optimizer",
    ),
}

WHOLE = "tp2-sp-pp2-dp2-distopt"

MODELS = {
    "gpt": "",
    "llama": "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --qk-layernorm "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2",
}


def losses(tmp_path: Path, name: str, world_size: int, flags: str) -> list[dict[str, float]]:
    """(loss, gradient norm) of each step, at full precision."""
    path = tmp_path / f"{name}.jsonl"
    pretrain_gpt(world_size, f"{EXACT} {flags} --metrics-jsonl {path}")
    rows = train_rows(path)
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    return rows


CASES = [
    pytest.param(model, layout, marks=[pytest.mark.slow] if model == "llama" and layout != WHOLE else [])
    for model in MODELS
    for layout in LAYOUTS
]
"""The equivalence matrix has these kinds of layers too: every change tests the second model in one layout."""


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    """A model's flags and what one process makes of them."""
    flags = MODELS[request.param]
    rows = losses(tmp_path_factory.mktemp("reference"), "one", 1, flags)
    assert rows[-1]["lm loss"] < rows[0]["lm loss"] - 0.1  # it learns, so the steps are not all alike
    return flags, rows


@pytest.mark.parametrize(("reference", "layout"), CASES, indirect=["reference"])
def test_losses_equal_one_process(layout: str, reference: tuple[str, list], tmp_path: Path) -> None:
    flags, expected = reference
    world_size, parallel = LAYOUTS[layout]
    rows = losses(tmp_path, layout, world_size, f"{flags} {parallel}")
    for row, one in zip(rows, expected):
        assert row["lm loss"] == pytest.approx(one["lm loss"], rel=1e-5)
        assert row["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-4)
        assert row["learning-rate"] == one["learning-rate"]


def initial_weights(tp: int, pp: int, folder: str) -> None:
    """Save the initial weights of a small GPT by their global names."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), folder)


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_plain_tensors(folder)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 2)])
def test_initial_weights_are_bitwise_equal(tp: int, pp: int, tmp_path: Path) -> None:
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    run_ranks(1, initial_weights, 1, 1, one)
    run_ranks(tp * pp, initial_weights, tp, pp, many)
    (expected,), (found,) = run_ranks(1, read_weights, one), run_ranks(1, read_weights, many)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
