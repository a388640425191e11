"""Weights, gradients and optimizer state of which each rank keeps some rows: the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
    TorchFullyShardedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.initialization import materialize_parameters
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import RankFailure, run_ranks

FEATURES, HIDDEN, BATCH = 13, 37, 12


class TinyModel(nn.Sequential):
    """Linear, norm, linear; five rows at the end, which four ranks cut into 2, 2, 1 and 0."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(FEATURES, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 5))
        self[0].weight.is_marked = True

    def sharded_state_dict(self, prefix: str = "", *unused: Any, metadata: Any = None) -> dict[str, ShardedTensor]:
        replica = (0, 0, parallel_state.get_data_parallel_rank())
        return {
            prefix + name: ShardedTensor.from_rank_offsets(prefix + name, param, replica_id=replica)
            for name, param in self.named_parameters()
        }


def build(sharded: bool, *, per_token: bool = False, **ddp: Any) -> tuple[Any, MegatronOptimizer]:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=per_token)
    chunk: nn.Module
    if sharded:
        settings = TorchFullyShardedDataParallelConfig(**ddp)
        chunk = TorchFullyShardedDataParallel(config, settings, TinyModel(), sub_modules_to_wrap=(nn.Linear,))
    else:
        chunk = DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), TinyModel())
    settings = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 1.0, "log_num_zeros_in_grad": True}
    return chunk, get_megatron_optimizer(OptimizerConfig(**settings), [chunk])


def train(chunk: Any, optimizer: MegatronOptimizer, steps: range) -> list[tuple[bool, float | None, float | None]]:
    """Results of steps of three microbatches on this rank's share of the batches."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    results = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3 * BATCH, FEATURES, generator=generator).chunk(ranks)[rank]
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with chunk.no_sync():
            for microbatch in x.chunk(3)[:2]:
                (chunk(microbatch).square().mean() / 3).backward()
        (chunk(x.chunk(3)[2]).square().mean() / 3).backward()
        chunk.finish_grad_sync()
        results.append(optimizer.step())
    return results


def whole_weights(chunk: Any) -> dict[str, Tensor]:
    if isinstance(chunk, TorchFullyShardedDataParallel):
        chunk.reshard()
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in chunk.module.named_parameters()
    }


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("per_token", [False, True])
def test_training_equals_replicas(reshard: bool, per_token: bool) -> None:
    run_ranks(4, check_training, reshard, per_token)


def check_training(reshard: bool, per_token: bool) -> None:
    parallel_state.initialize_model_parallel()
    plain, plain_optimizer = build(sharded=False, per_token=per_token)
    chunk, optimizer = build(sharded=True, per_token=per_token, reshard_after_forward=reshard)
    total = torch.tensor(sum(one.local.numel() for one in chunk.rows))
    torch.distributed.all_reduce(total)
    assert total == sum(param.numel() for param in plain.parameters())  # nothing is kept twice
    results, expected = train(chunk, optimizer, range(4)), train(plain, plain_optimizer, range(4))
    torch.testing.assert_close(whole_weights(chunk), whole_weights(plain), rtol=2e-6, atol=1e-6)
    norms, expected_norms = ([norm for _, norm, _ in some] for some in (results, expected))
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert [zeros for *_, zeros in results] == [zeros for *_, zeros in expected]
    assert all(one.param.is_marked for one in chunk.rows if one.name == "0.weight")


def test_weights_are_freed_between_uses() -> None:
    run_ranks(2, check_resharding)


def check_resharding() -> None:
    parallel_state.initialize_model_parallel()
    chunk, optimizer = build(sharded=True)
    train(chunk, optimizer, range(1))
    assert all(isinstance(param, DTensor) for param in chunk.parameters())
    with torch.no_grad():
        chunk(torch.zeros(1, FEATURES))
    assert not all(isinstance(param, DTensor) for param in chunk.parameters())  # the root's own
    described = chunk.sharded_state_dict()
    assert all(isinstance(param, DTensor) for param in chunk.parameters())
    assert all(value.data is not None and value.axis_fragmentations is None for value in described.values())


@pytest.mark.parametrize(
    ("source", "target"), [((4, True), (2, True)), ((4, True), (1, False)), ((2, False), (4, True))]
)
def test_checkpoints_know_nothing_of_the_sharding(
    source: tuple[int, bool], target: tuple[int, bool], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    saved, *_ = run_ranks(source[0], train_and_save, source[1], folder)
    for found in run_ranks(target[0], load_and_train, target[1], folder):
        torch.testing.assert_close(found[0], saved[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], saved[1], rtol=2e-6, atol=1e-6)


def request(chunk: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    model = chunk.sharded_state_dict()
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading)}


def train_and_save(sharded: bool, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights when saved, and after two more steps."""
    parallel_state.initialize_model_parallel()
    chunk, optimizer = build(sharded)
    train(chunk, optimizer, range(2))
    dist_checkpointing.save(request(chunk, optimizer, is_loading=False), folder)
    before = whole_weights(chunk)
    train(chunk, optimizer, range(2, 4))
    return before, whole_weights(chunk)


def load_and_train(sharded: bool, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parallel_state.initialize_model_parallel()
    chunk, optimizer = build(sharded)
    for param in chunk.parameters():
        torch.nn.init.zeros_(param.to_local() if isinstance(param, DTensor) else param.data)
    loaded = dist_checkpointing.load(request(chunk, optimizer, is_loading=True), folder)
    chunk.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    before = whole_weights(chunk)
    train(chunk, optimizer, range(2, 4))
    return before, whole_weights(chunk)


def test_whole_parameters_can_be_loaded_and_others_are_refused() -> None:
    run_ranks(2, check_loading)


def check_loading() -> None:
    parallel_state.initialize_model_parallel()
    chunk, _ = build(sharded=True)
    whole = {name: torch.rand(param.shape) for name, param in TinyModel().named_parameters()}
    chunk.load_state_dict(whole)
    torch.testing.assert_close(whole_weights(chunk), whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"0\.bias has shape \(3,\) in the state dict; this rank keeps"):
        chunk.load_state_dict({**whole, "0.bias": torch.zeros(3)})
    with pytest.raises(KeyError, match=r"0\.bias is missing"):
        chunk.load_state_dict({name: value for name, value in whole.items() if name != "0.bias"})


def test_nan_is_reported_with_its_parameter() -> None:
    with pytest.raises(RankFailure, match=r"gradient of 0\.weight has 1 NaN or infinite values"):
        run_ranks(2, put_nan_into_gradient)


def put_nan_into_gradient() -> None:
    parallel_state.initialize_model_parallel()
    chunk, _ = build(sharded=True, check_for_nan_in_grad=True)
    chunk(torch.zeros(1, FEATURES)).sum().backward()
    chunk.rows[0].param.grad.to_local()[0, 0] = float("nan")
    chunk.finish_grad_sync()


# --- construction on the meta device ---


def gpt(tp: int, on_meta: bool) -> GPTModel:
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        gated_linear_unit=True,
        tensor_model_parallel_size=tp,
        init_model_with_meta_device=on_meta,
    )
    spec = get_gpt_layer_local_spec()
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16)


def save_initial_weights(tp: int, form: str, folder: str) -> None:
    parallel_state.initialize_model_parallel(tp)
    model = gpt(tp, on_meta=form != "plain")
    chunk: Any = model
    if form == "sharded":
        chunk = TorchFullyShardedDataParallel(model.config, TorchFullyShardedDataParallelConfig(), model)
    elif form == "materialized":
        before = dict(model.named_parameters())
        assert all(param.is_meta for param in before.values())
        materialize_parameters(model, model.global_parameter_name)
        after = dict(model.named_parameters())
        assert all(after[name] is param and not param.is_meta for name, param in before.items())
        assert model.output_layer.weight.tensor_model_parallel
    dist_checkpointing.save(chunk.sharded_state_dict(), folder)


@pytest.mark.parametrize(("ranks", "tp", "form"), [(2, 1, "sharded"), (6, 2, "sharded"), (2, 2, "materialized")])
def test_meta_construction_starts_from_the_same_weights(ranks: int, tp: int, form: str, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    for folder, size, arguments in ((one, 1, (1, "plain")), (many, ranks, (tp, form))):
        folder.mkdir()
        run_ranks(size, save_initial_weights, *arguments, str(folder))
    expected, found = (dist_checkpointing.load_plain_tensors(str(folder)) for folder in (one, many))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_cannot_be_filled_later_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"weight cannot be built on the meta device"):
        materialize_parameters(model)
