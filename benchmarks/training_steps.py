"""A training step of any model on one process, by plain torch and by the framework, as `train_cpu.py` compares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, BATCH = 512, 4
LR, CLIP, DECAY = 1e-4, 1.0, 0.1

Step = Callable[..., float]
"""Trains on one batch, handed in as the arguments that the contender takes."""


def torch_step(model: nn.Module, loss_of: Callable[..., Tensor], how: str, device: str = "cpu") -> Step:
    """A usual training step with fused AdamW.

    `how`: "fp32"; "bf16", weights in bf16 with fp32 main parameters; "autocast", fp32 weights with autocast to bf16.
    """
    mains = list(model.parameters())
    if how == "bf16":
        mains = [param.detach().clone() for param in mains]
        model.to(torch.bfloat16)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(mains, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)

    def step(*batch: Any) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
            loss = loss_of(*batch)
        loss.backward()
        if how == "bf16":
            for main, weight in zip(mains, weights):
                main.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(mains, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if how == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(weights, mains)
        return loss.item()

    return step


def our_config(layers: int, hidden: int, heads: int, *, half: bool, **others: Any) -> Any:
    """The configuration of a model of ours: no dropout, and what makes a step faster; `half` in bf16."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        gradient_accumulation_fusion=True,
        cross_entropy_loss_fusion=True,
        **others,
    )


def prepare_one_process() -> None:
    """Process groups of one rank, and the seed."""
    from megatron.core import device, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        device.set_device(0)
        backend, store = device.communication_backend(), torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def scheduled_step(
    model: nn.Module, config: Any, forward_step: Callable[..., Any], length: int = LENGTH, batch_size: int = BATCH
) -> Step:
    """A step of `model` by our schedule, data parallel buffers and optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    if config.bf16:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=LR,
            weight_decay=DECAY,
            adam_beta2=0.95,
            clip_grad=CLIP,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        [model],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    config.grad_scale_func = optimizer.scale_loss
    forward_backward = get_forward_backward_func()

    def step(*batch: Any) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch_size,
            forward_only=False,
        )
        optimizer.step()
        return reports[0]["loss"].item()

    return step
