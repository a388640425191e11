"""What ranks owe each other's gradients after the last backward, with gradients that tell where they come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks


class Chunk(nn.Module):
    """Parameters whose gradient on rank r is 10**r everywhere, under a wrapper's interface."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=6, hidden_size=4, num_attention_heads=4, pipeline_dtype=torch.float32, **config
        )
        self.events: list[str] = []

    def add(self, name: str, dtype: torch.dtype = torch.float32, **attributes: Any) -> nn.Parameter:
        param = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        for key, value in attributes.items():
            setattr(param, key, value)
        self.register_parameter(name, param)
        param.main_grad = torch.full_like(param, 10.0 ** dist.get_rank())
        return param

    def finish_grad_sync(self) -> None:
        self.events.append("data parallel")

    def scale_gradients(self, factor: float) -> None:
        self.events.append(f"scale {factor:g}")

    def gradients(self) -> dict[str, float]:
        """Each must be one number everywhere."""
        grads = {name: param.main_grad for name, param in self.named_parameters()}
        assert all(bool((grad == grad.flatten()[0]).all()) for grad in grads.values())
        return {name: float(grad.flatten()[0]) for name, grad in grads.items()}


def tensor_parallel_gradients(sequence_parallel: bool, qk_layernorm: bool) -> dict[str, float]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    chunk = Chunk(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, qk_layernorm=qk_layernorm)
    chunk.add("norm", sequence_parallel=True)
    chunk.add("rounded", torch.bfloat16, sequence_parallel=True)
    chunk.add("linear", sequence_parallel=False)
    chunk.add("q_layernorm_weight")
    chunk.add("frozen", sequence_parallel=True).requires_grad_(False)
    finalize_model_grads([chunk])
    assert chunk.events == ["data parallel"]
    return chunk.gradients()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_partial_gradients_are_summed_over_tensor_ranks(sequence_parallel: bool, qk_layernorm: bool) -> None:
    """Norms see other tokens on each rank under sequence parallelism, norms of heads always other heads."""
    for rank, found in enumerate(run_ranks(2, tensor_parallel_gradients, sequence_parallel, qk_layernorm)):
        own, summed = 10.0**rank, 11.0
        assert found == {
            "norm": summed if sequence_parallel else own,
            "rounded": summed if sequence_parallel else own,
            "linear": own,
            "q_layernorm_weight": summed if qk_layernorm else own,
            "frozen": own,
        }


class Embeddings(Chunk):
    """A stage with the names by which a model's embeddings are found; the first two are the first of their stacks."""

    def __init__(self, tied: bool, two_stacks: bool) -> None:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        super().__init__(pipeline_model_parallel_size=stages)
        self.both_ends_embed = lambda: tied
        self.word = self.add("word")
        self.position = self.add("position")
        self.table = self.add("table")
        if two_stacks:
            self.weights_of_both_stacks = lambda: [self.position] if dist.get_rank() < 2 else []
            mine = 0 if dist.get_rank() == 0 else 1
            self.weights_of_every_stage = lambda: {i: self.table if i == mine else None for i in (0, 1)}

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.word


def pipeline_gradients(tied: bool, two_stacks: bool) -> dict[str, float]:
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=3, pipeline_model_parallel_split_rank=1 if two_stacks else None
    )
    chunk = Embeddings(tied, two_stacks)
    finalize_model_grads([chunk])
    return chunk.gradients()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("two_stacks", [True, False])
def test_copies_of_an_embedding_get_the_sum_of_their_gradients(tied: bool, two_stacks: bool) -> None:
    """Tied word embeddings over the first stage, the first of a second stack, and the last; positions over the first
    stages of both stacks; tables over all stages of their stack."""
    words = [1.0, 10.0, 100.0] if not tied else [111.0] * 3 if two_stacks else [101.0, 10.0, 101.0]
    positions = [11.0, 11.0, 100.0] if two_stacks else [1.0, 10.0, 100.0]
    tables = [1.0, 110.0, 110.0] if two_stacks else [1.0, 10.0, 100.0]
    found = run_ranks(3, pipeline_gradients, tied, two_stacks)
    assert found == [{"word": w, "position": p, "table": t} for w, p, t in zip(words, positions, tables)]


def events_with_tokens(tokens_of_rank: list[int]) -> list[str]:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    chunk = Chunk(pipeline_model_parallel_size=2)
    chunk.add("weight")
    finalize_model_grads([chunk], torch.tensor(tokens_of_rank[dist.get_rank()]))
    return chunk.events


def test_gradients_are_divided_by_the_tokens_of_all_last_stages() -> None:
    # ranks 0 and 1 are the first stage of two replicas, ranks 2 and 3 the last
    assert run_ranks(4, events_with_tokens, [7, 7, 3, 5]) == [["data parallel", "scale 0.125"]] * 4
    assert run_ranks(4, events_with_tokens, [7, 7, 0, 0]) == [["data parallel", "scale 1"]] * 4


def gradients_of_plain_parameters() -> list[float]:
    """Without a gradient buffer they lie in `.grad`, or are missing."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    chunk = Chunk(tensor_model_parallel_size=2, sequence_parallel=True)
    for name in ("used", "unused"):
        del chunk.add(name, sequence_parallel=True).main_grad
    chunk.used.grad = torch.full((2, 3), 10.0 ** dist.get_rank())
    finalize_model_grads([chunk])
    assert chunk.unused.grad is None
    return chunk.used.grad.unique().tolist()


def test_gradients_outside_a_buffer() -> None:
    assert run_ranks(2, gradients_of_plain_parameters) == [[11.0], [11.0]]
