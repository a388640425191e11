"""A model is built and trained with groups that are handed to it: nothing is process-wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.group_creation import create_process_groups
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from tests.worker_pool import run_ranks

LENGTH, GLOBAL_BATCH, STEPS = 16, 4, 3
Row = tuple[float, float]
"""Loss and gradient norm of a step."""


def train(tp: int, pp: int, settings: dict[str, Any], half: bool) -> list[Row]:
    """The last stage's rows; GLOBAL_BATCH samples a step in microbatches of one."""
    created = create_process_groups(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    groups = created.groups
    model_parallel_cuda_manual_seed(123, tp_rank=get_pg_rank(groups.tp), ep_rank=0, etp_rank=0)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1,
        pipeline_dtype=torch.bfloat16 if half else torch.float32,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        gradient_accumulation_fusion=True,
        qk_layernorm=True,
        **settings,
    )
    stage, stages = get_pg_rank(groups.pp), get_pg_size(groups.pp)
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=True),
        64,
        LENGTH,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        model_comm_pgs=groups,
    )
    if half:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, use_distributed_optimizer=True, bf16=half, params_dtype=config.params_dtype), [model]
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    config.grad_scale_func = optimizer.scale_loss
    replicas, replica = get_pg_size(groups.dp), get_pg_rank(groups.dp)
    rows = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.zero_grad_buffer()
        reports = get_forward_backward_func(pp_size=stages)(
            forward_step_func=forward_step,
            data_iterator=samples(replica, replicas),
            model=[model],
            num_microbatches=GLOBAL_BATCH // replicas,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.stack([report["lm loss"] for report in reports]).sum(0) if reports else torch.zeros(2)
        torch.distributed.all_reduce(loss, group=groups.dp)
        rows.append(((loss[0] / loss[1]).item(), float(norm)))
    assert parallel_state.is_unitialized()
    created.destroy()
    return rows if stage == stages - 1 else []


def samples(replica: int, replicas: int) -> Iterator[Tensor]:
    tokens = torch.randint(0, 64, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    return iter(tokens[replica::replicas].split(1))


def forward_step(batch: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    tokens = next(batch)
    output = model(tokens[:, :-1], torch.arange(LENGTH)[None], None, labels=tokens[:, 1:])
    return output, loss_func


def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = losses.float().sum(), torch.tensor(losses.numel())
    return total, count, {"lm loss": torch.stack((total.detach(), count.float()))}


def check(world_size: int, tp: int, pp: int, settings: dict[str, Any], half: bool, rel: float) -> None:
    (expected,) = run_ranks(1, train, 1, 1, {}, half)
    found = [rows for rows in run_ranks(world_size, train, tp, pp, settings, half) if rows]
    assert len(found) == world_size // pp
    for rows in found:
        for (loss, norm), (expected_loss, expected_norm) in zip(rows, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=rel)
            assert norm == pytest.approx(expected_norm, rel=10 * rel)
    assert expected[-1][0] < expected[0][0]


def test_eight_ranks_in_three_dimensions_equal_one_process() -> None:
    check(8, 2, 2, {}, half=False, rel=1e-5)


def test_half_precision_recompute_and_communication_in_pieces() -> None:
    settings = {
        "tp_comm_overlap": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    check(4, 2, 2, settings, half=True, rel=5e-3)  # bf16 rounds sums of other orders to 1/256
