"""Tensors between neighbouring stages: what is sent in one direction arrives there, also around the ring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.worker_pool import run_ranks

SHAPE = (3, 2, 4)  # [s, b, h]
ACTIVATIONS, GRADIENTS = 0, 1


def build_config(**changes: Any) -> ModelParallelConfig:
    stages = dist.get_world_size()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    return ModelParallelConfig(pipeline_model_parallel_size=stages, **{"pipeline_dtype": torch.float32, **changes})


def made_by(stage: int, kind: int, length: int = SHAPE[0]) -> Tensor:
    """What `stage` (modulo the ring) sends; no two of them are equal."""
    number = stage % dist.get_world_size() * 10 + kind
    return torch.arange(length * 8.0).view(length, 2, 4) + 1000 * number


def assert_received(found: Tensor | None, stage: int, kind: int, length: int = SHAPE[0]) -> None:
    assert found is not None
    assert found.requires_grad
    assert torch.equal(found, made_by(stage, kind, length))


def check_one_way() -> None:
    config, stage, last = build_config(), dist.get_rank(), dist.get_world_size() - 1
    received = p2p.recv_forward(SHAPE, config, stage == 0)
    p2p.send_forward(made_by(stage, ACTIVATIONS), config, stage == last)
    if stage == 0:
        assert received is None
    else:
        assert_received(received, stage - 1, ACTIVATIONS)
    received = p2p.recv_backward(SHAPE, config, stage == last)
    p2p.send_backward(made_by(stage, GRADIENTS), config, stage == 0)
    if stage == last:
        assert received is None
    else:
        assert_received(received, stage + 1, GRADIENTS)


def check_pairs() -> None:
    config, stage = build_config(), dist.get_rank()
    last = dist.get_world_size() - 1
    for sender in (stage % 2 == 0, stage % 2 == 1):  # pairs (0, 1), (2, 3), then (1, 2)
        if sender:
            activations = made_by(stage, ACTIVATIONS)
            found = p2p.send_forward_recv_backward(activations, SHAPE, config, stage == last)
            if stage < last:
                assert_received(found, stage + 1, GRADIENTS)
        else:
            gradients = made_by(stage, GRADIENTS)
            found = p2p.send_backward_recv_forward(gradients, SHAPE, config, stage == 0)
            if stage > 0:
                assert_received(found, stage - 1, ACTIVATIONS)
        if sender and stage == last or not sender and stage == 0:
            assert found is None


def check_ring() -> None:
    config, stage = build_config(), dist.get_rank()
    activations, gradients = made_by(stage, ACTIVATIONS), made_by(stage, GRADIENTS)
    found = p2p.send_forward_recv_forward(activations, True, SHAPE, config)
    assert_received(found, stage - 1, ACTIVATIONS)
    found = p2p.send_backward_recv_backward(gradients, True, SHAPE, config)
    assert_received(found, stage + 1, GRADIENTS)
    both = p2p.send_forward_backward_recv_forward_backward(activations, gradients, True, True, SHAPE, config)
    assert_received(both[0], stage - 1, ACTIVATIONS)
    assert_received(both[1], stage + 1, GRADIENTS)


def check_open_ring() -> None:
    """The last stage sends nothing on, the first nothing back: as at the ends of interleaved schedules."""
    config, stage, last = build_config(), dist.get_rank(), dist.get_world_size() - 1
    activations = None if stage == last else made_by(stage, ACTIVATIONS)
    gradients = None if stage == 0 else made_by(stage, GRADIENTS)
    found = p2p.send_forward_recv_forward(activations, stage > 0, SHAPE, config)
    back = p2p.send_backward_recv_backward(gradients, stage < last, SHAPE, config)
    both = p2p.send_forward_backward_recv_forward_backward(
        activations, gradients, stage > 0, stage < last, SHAPE, config
    )
    for forward, backward in ((found, back), both):
        if stage > 0:
            assert_received(forward, stage - 1, ACTIVATIONS)
        else:
            assert forward is None
        if stage < last:
            assert_received(backward, stage + 1, GRADIENTS)
        else:
            assert backward is None


def check_lengths() -> None:
    """Each stage sends tensors of another length, of which the receiver knows nothing."""
    config, stage = build_config(variable_seq_lengths=True), dist.get_rank()
    size = dist.get_world_size()
    activations, gradients = made_by(stage, ACTIVATIONS, stage + 1), made_by(stage, GRADIENTS, stage + 5)
    both = p2p.send_forward_backward_recv_forward_backward(activations, gradients, True, True, SHAPE, config)
    assert_received(both[0], stage - 1, ACTIVATIONS, (stage - 1) % size + 1)
    assert_received(both[1], stage + 1, GRADIENTS, (stage + 1) % size + 5)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("check", [check_one_way, check_pairs, check_ring, check_open_ring, check_lengths])
def test_tensors_arrive_where_they_belong(check: Any, stages: int) -> None:
    run_ranks(stages, check)


def check_types() -> None:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    for dtype, fp32_residual, expected in (
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.float32),
    ):
        config = TransformerConfig(
            num_layers=2,
            hidden_size=4,
            num_attention_heads=1,
            pipeline_model_parallel_size=2,
            pipeline_dtype=dtype,
            fp32_residual_connection=fp32_residual,
        )
        sent = made_by(dist.get_rank(), ACTIVATIONS).to(expected).transpose(0, 2).contiguous().transpose(0, 2)
        received = p2p.send_forward_recv_forward(sent, True, SHAPE, config)
        assert received.dtype == expected
        assert torch.equal(received, made_by(dist.get_rank() - 1, ACTIVATIONS).to(expected))


def test_types_and_strided_tensors() -> None:
    run_ranks(2, check_types)


def check_type_is_needed() -> None:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="pipeline_dtype must be set"):
        p2p.send_forward(torch.zeros(SHAPE), ModelParallelConfig(), is_last_stage=False)


def test_the_type_of_what_is_received_must_be_known() -> None:
    run_ranks(2, check_type_is_needed)
