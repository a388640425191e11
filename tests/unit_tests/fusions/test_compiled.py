"""Compiled regions: the same numbers as without, one compilation for all layers, a clear word where none is possible.

Most tests trace and differentiate the regions as `torch.compile` does but leave out the C++ (backend aot_eager).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.device import device_type
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions import compiled
from megatron.core.fusions.compiled import why_not_compilable
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.settings import ConfigurationError
from tests.functional_tests.program import TINY, run_program
from tests.unit_tests.training.settings_for_tests import validated
from tests.worker_pool import run_ranks

LENGTH, BATCH = 16, 2
GPT2 = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "layernorm_zero_centered_gamma": True,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}


def train(layout: dict[str, Any], **settings: Any) -> list[Tensor]:
    """Losses of two microbatches and all gradients, in `main_grad` of the data parallel buffers."""
    model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        gradient_accumulation_fusion=True,
        **layout,
        **settings,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    bare = GPTModel(config, spec, 64, LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=True)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), bare)
    ids = torch.randint(0, 64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(2):
        loss = model(ids[:, :-1], torch.arange(LENGTH).expand(BATCH, -1), None, labels=ids[:, 1:]).mean()
        loss.backward()
        losses.append(loss.detach())
    return [torch.stack(losses), *(param.main_grad.clone() for param in bare.parameters())]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "SLOWER_ON_CPU", ())
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("variant", "memory"),
    [(GPT2, {}), (GPT2, FULL), (LLAMA, SELECTIVE)],
    ids=["gpt2", "gpt2 full recompute", "llama selective recompute"],
)
def test_numbers_stay_with_dropout_and_recompute(variant: dict, memory: dict, traced: None) -> None:
    torch.testing.assert_close(train({}, torch_compile=True, **variant, **memory), train({}, **variant))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_sum_and_norm_in_one_region(kind: str, zero_centered: bool, traced: None) -> None:
    settings: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "normalization": kind}
    settings |= {"layernorm_zero_centered_gamma": zero_centered}
    norms = [FusedLayerNorm(TransformerConfig(torch_compile=on, **settings), 8) for on in (False, True)]
    assert [norm.adds for norm in norms] == [False, True]
    x, residual, direction, other = torch.randn(4, 3, 2, 8).unbind()
    for bias in (None, torch.randn(8)):
        found = []
        for norm in norms:
            torch.manual_seed(1)
            with torch.no_grad():
                for param in norm.parameters():
                    param.copy_(torch.randn(8))
            torch.manual_seed(2)  # of the dropout
            leaves = [t.clone().requires_grad_() for t in (x, residual, *([] if bias is None else [bias]))]
            added = (leaves[2] if bias is not None else None, leaves[1], 0.3, True)
            if norm.adds:
                total, normed = norm(leaves[0], added)
            else:
                total = compiled.bias_dropout_add(leaves[0], *added)
                normed = norm(total)
            (total * direction + normed * other).sum().backward()
            found.append([total, normed, *(leaf.grad for leaf in (*leaves, *norm.parameters()))])
            norm.zero_grad()
        torch.testing.assert_close(found[1], found[0])


def test_layers_add_with_their_second_norm(traced: None) -> None:
    model_parallel_cuda_manual_seed(1234)
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    several = ((True, {}), (False, {}), (True, SELECTIVE))
    configs = [TransformerConfig(torch_compile=on, **shape, **more) for on, more in several]
    models = [GPTModel(config, get_gpt_layer_local_spec(), 64, LENGTH) for config in configs]
    assert [[layer.adds_with_norm for layer in model.decoder.layers] for model in models] == [
        [True, True],
        [False, False],
        [False, False],  # where norms are computed again
    ]


def test_numbers_stay_with_activations_on_the_host(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.transformer.activation_offload.SMALLEST", 64)
    away = {"cpu_offloading": True, "cpu_offloading_num_layers": 2}
    torch.testing.assert_close(train({}, torch_compile=True, **GPT2, **away), train({}, **GPT2))


@contextmanager
def tracing() -> Iterator[None]:
    """What the fixture `traced` does, on a rank."""
    compiled.BACKEND, compiled.SLOWER_ON_CPU, default = "aot_eager", (), compiled.SLOWER_ON_CPU
    try:
        yield
    finally:
        compiled.BACKEND, compiled.SLOWER_ON_CPU = "inductor", default
        torch._dynamo.reset()


def check_layout(layout: dict[str, Any], memory: dict[str, Any]) -> None:
    sizes = {name: layout[name] for name in layout if name.endswith("_size")}
    parallel_state.initialize_model_parallel(**sizes)
    with tracing():
        expected = train(layout, **LLAMA)
        torch.testing.assert_close(train(layout, torch_compile=True, **LLAMA, **memory), expected)


def test_numbers_stay_under_sequence_parallelism() -> None:
    run_ranks(2, check_layout, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, SELECTIVE)


@pytest.mark.slow
def test_numbers_stay_under_context_parallelism() -> None:
    """Attention communicates outside of the regions; the rotation is of this rank's tokens."""
    run_ranks(2, check_layout, {"context_parallel_size": 2}, {}, timeout=600)


def losses_fully_sharded(flags: str) -> str:
    """What pretrain_gpt.py prints with FSDP2."""
    with tracing():
        sharded = "--use-torch-fsdp2 --no-gradient-accumulation-fusion --untie-embeddings-and-output-weights"
        words = f"--train-iters 3 {sharded} --swiglu --normalization RMSNorm {flags}".split()
        return run_program("pretrain_gpt.py", [*TINY, *words])


@pytest.mark.slow
def test_numbers_stay_fully_sharded() -> None:
    """Each layer's weights are whole while it runs, and another tensor every time."""
    plain, other = (run_ranks(2, losses_fully_sharded, flags, timeout=600) for flags in ("", "--torch-compile"))
    found, expected = (re.findall(r"lm loss: (\S+) .*?grad norm: (\S+)", "".join(said)) for said in (other, plain))
    assert len(expected) == 3 and found == expected


def test_all_layers_share_one_compilation(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", count)
    compiled._compiled.cache_clear()
    train({}, torch_compile=True, **GPT2)
    # Of three layers: norm, sum and norm, bias-dropout-add, activation, rotation (of queries and keys).
    assert len(graphs) == 5
    train({}, torch_compile=True, **GPT2)
    assert len(graphs) == 5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_the_eager_function(dtype: torch.dtype, interleaved: bool) -> None:
    from megatron.core.fusions.fused_rotary import RotatePairs

    t, angles = torch.randn(6, 2, 4, 10).to(dtype).requires_grad_(), torch.randn(6, 1, 1, 4)
    found = compiled.rotate(t, angles, 1.3, interleaved)
    expected = RotatePairs.apply(t, angles.cos() * 1.3, angles.sin() * 1.3, interleaved)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    direction = torch.randn(t.shape).to(dtype)
    torch.testing.assert_close(*(torch.autograd.grad(y, t, direction) for y in (found, expected)))


WHY_NOT = why_not_compilable(device_type(), os.environ)


@pytest.mark.skipif(WHY_NOT is not None, reason=f"torch.compile lacks {WHY_NOT}")
def test_compiled_to_machine_code() -> None:
    x, bias, residual = torch.randn(8, 2, 32), torch.randn(32), torch.randn(8, 2, 32)
    results = []
    for run in (compiled.bias_dropout_add, compiled.region(compiled.bias_dropout_add)):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = run(leaf, bias, residual, 0.25, True)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=f"torch.compile lacks {WHY_NOT}")
@pytest.mark.parametrize("variant", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_model_compiled_to_machine_code(variant: dict) -> None:
    torch.testing.assert_close(train({}, torch_compile=True, **variant), train({}, **variant))


# --- what is missing ---


def test_a_missing_compiler_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match=r"--torch-compile needs a C\+\+ compiler: no-such-compiler.*CXX"):
        validated("--torch-compile")
    validated()


def test_missing_headers_and_triton_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in str(why_not_compilable("cpu", {}))
    (tmp_path / "Python.h").touch()
    assert why_not_compilable("cpu", {}) is None
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert "triton" in str(why_not_compilable("cuda", {}))
