"""A training run of a tiny GPT in any layout, without flags or data files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, set_initialization_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.save import save_run
from megatron.training.train_state import TrainState

VOCAB, LENGTH, BATCH = 48, 8, 8


@dataclass(frozen=True)
class Plan:
    """What to run."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    dist_opt: bool = False
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    dropout: float = 0.1
    format: str = "torch_dist"
    layers: int = 4
    hidden: int = 16
    fully_parallel: bool = True
    untied: bool = False
    vpp: int | None = None
    """Model chunks on each pipeline rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def arguments(self, folder: str, **changes: Any) -> argparse.Namespace:
        """The flags that checkpoints depend on."""
        values = {
            "save": folder,
            "load": folder,
            "ckpt_format": self.format,
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": 4,
            "add_position_embedding": True,
            "attention_backend": AttnBackend.auto,
            "params_dtype": self.dtype,
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "use_distributed_optimizer": self.dist_opt,
            "ckpt_fully_parallel_save": self.fully_parallel,
            "dist_ckpt_strictness": "assume_ok_unexpected",
            **dict.fromkeys(
                ("finetune", "exit_on_missing_checkpoint", "auto_detect_ckpt_format", "ckpt_fully_parallel_load"), False
            ),
            **dict.fromkeys(("no_save_optim", "no_save_rng", "no_load_optim", "no_load_rng", "ckpt_step")),
            **dict.fromkeys(("save_keep_last", "save_retain_interval", "async_save", "use_persistent_ckpt_worker")),
            **dict.fromkeys(("non_persistent_ckpt_type", "non_persistent_global_ckpt_dir")),
            "non_persistent_local_ckpt_dir": None,
            "non_persistent_local_ckpt_algo": "fully_parallel",
            "replication": False,
            "world_size": self.size,
            "async_strategy": "mcore",
            "ckpt_assume_constant_structure": False,
            "ckpt_verify": "checksums",
            "pretrained_checkpoint": None,
            "vocab_file": None,
        }
        return argparse.Namespace(**{**values, **changes})


class TinyRun:
    """Model, optimizer and schedule on this rank. Process groups are made if there are none."""

    def __init__(self, plan: Plan, seed: int = 7) -> None:
        self.plan = plan
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(plan.tp, plan.pp, plan.vpp)
        stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(stage_seed)
        model_parallel_cuda_manual_seed(stage_seed)
        set_initialization_seed(seed)
        self.config = self._build_config()
        self.model: list[nn.Module] = [self._build_chunk(i) for i in range(plan.vpp or 1)]
        half = {"bf16": plan.dtype == torch.bfloat16, "fp16": plan.dtype == torch.float16}
        config = OptimizerConfig(
            lr=1e-2,
            weight_decay=0.1,
            use_distributed_optimizer=plan.dist_opt,
            params_dtype=plan.dtype,
            clip_grad=1.0,
            **half,
        )
        self.optimizer = get_megatron_optimizer(config, self.model)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, 1e-2, 1e-3, 16, 160, "cosine", 0.1, 0.1, 160, "constant", False, False
        )
        self.state = TrainState()
        self.checkpoints = CheckpointContext()

    def _build_config(self) -> TransformerConfig:
        plan = self.plan
        return TransformerConfig(
            num_layers=plan.layers,
            hidden_size=plan.hidden,
            num_attention_heads=4,
            ffn_hidden_size=32,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            hidden_dropout=plan.dropout,
            attention_dropout=plan.dropout,
            tensor_model_parallel_size=plan.tp,
            pipeline_model_parallel_size=plan.pp,
            virtual_pipeline_model_parallel_size=plan.vpp,
            sequence_parallel=plan.sequence_parallel,
            params_dtype=plan.dtype,
            pipeline_dtype=plan.dtype,
            bf16=plan.dtype == torch.bfloat16,
            fp16=plan.dtype == torch.float16,
        )

    def _build_chunk(self, number: int) -> nn.Module:
        stage = None
        if self.plan.vpp is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(number)
            stage = number
        plan, half = self.plan, self.plan.dtype != torch.float32
        model: nn.Module = GPTModel(
            self.config,
            get_gpt_layer_local_spec(),
            VOCAB,
            LENGTH,
            parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=not plan.untied,
            vp_stage=stage,
        )
        if half:
            model = Float16Module(self.config, model)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=plan.dist_opt, grad_reduce_in_fp32=True)
        return DistributedDataParallel(self.config, ddp_config, model)

    def train(self, steps: int) -> list[tuple[float | None, ...]]:
        """(loss on the last stage, gradient norm, learning rate) of each step."""
        results = []
        for _ in range(steps):
            for chunk in self.model:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            self.optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=[self._microbatches() for _ in self.model],
                model=self.model,
                num_microbatches=BATCH // 2 // self.plan.dp,
                seq_length=LENGTH,
                micro_batch_size=2,
            )
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(BATCH)
            self.state.iteration += 1
            self.state.consumed_train_samples += BATCH
            self.state.num_floating_point_operations_so_far += 1e6
            loss = sum(float(report["loss"]) for report in reports) if reports else None
            results.append(
                (loss, None if grad_norm is None else float(grad_norm), self.optimizer.param_groups[0]["lr"])
            )
        return results

    def _microbatches(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.state.iteration)
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        yield from ids.chunk(self.plan.dp)[parallel_state.get_data_parallel_rank()].split(2)

    @staticmethod
    def _forward_step(iterator: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
        ids = next(iterator)
        positions = torch.arange(LENGTH).expand(len(ids), -1)

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total = output.float().sum()
            return total, torch.tensor(output.numel(), dtype=torch.int), {"loss": total.detach()}

        return model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous()), loss_func

    def save(self, folder: str, *, non_persistent: bool = False, data_iterator: Any = None, **changes: Any) -> None:
        """Write a checkpoint."""
        save_run(
            self.plan.arguments(folder, **changes),
            self.state,
            self.model,
            self.optimizer,
            self.scheduler,
            self.checkpoints,
            non_persistent=non_persistent,
            data_iterator=data_iterator,
        )

    def load(self, folder: str, **changes: Any) -> None:
        """Continue from the latest checkpoint."""
        args = self.plan.arguments(folder, **changes)
        self.state = load_run(args, self.model, self.optimizer, self.scheduler)

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's parameters."""
        return {
            (name if i == 0 else f"{i}.{name}"): param.detach().clone()
            for i, chunk in enumerate(self.model)
            for name, param in chunk.named_parameters()
        }
