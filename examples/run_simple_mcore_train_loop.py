"""A training loop written against the library alone: no flags, no run-wide state, a GPU or a CPU per rank.

    torchrun --nproc-per-node 2 examples/run_simple_mcore_train_loop.py CHECKPOINT_FOLDER

trains a tiny GPT on made-up data with tensor parallelism 2, saves it, loads it into a second model and
compares the two. `megatron.training` does all this and more from flags; here every step is on one page.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from megatron.core import device, dist_checkpointing, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.tokenizer.tokenizer import _NullTokenizer

TENSOR_PARALLEL, PIPELINE_PARALLEL = 2, 1
SEQUENCE_LENGTH, MICRO_BATCH_SIZE, NUM_MICROBATCHES = 64, 4, 2
VOCAB_SIZE, NUM_STEPS = 128, 10


def initialize() -> None:
    """Join the ranks and cut them into groups; torchrun sets the environment variables."""
    device.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(device.communication_backend())
    parallel_state.initialize_model_parallel(TENSOR_PARALLEL, PIPELINE_PARALLEL)
    model_parallel_cuda_manual_seed(123)


def build_model() -> DistributedDataParallel:
    """This rank's part of the GPT. Its initial weights depend on the seed and not on the layout."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=TENSOR_PARALLEL,
        pipeline_model_parallel_size=PIPELINE_PARALLEL,
        pipeline_dtype=torch.float32,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model.to(device.current_device())
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=model)


def build_data() -> Iterator[dict[str, Tensor]]:
    """Micro-batches of this data-parallel rank."""
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQUENCE_LENGTH,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # causal attention needs no mask
        tokenizer=_NullTokenizer(vocab_size=VOCAB_SIZE - 1),
    )
    sizes = [NUM_STEPS * NUM_MICROBATCHES * MICRO_BATCH_SIZE * torch.distributed.get_world_size(), None, None]
    dataset, _, _ = BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()
    sampler = DistributedSampler(
        dataset,
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
        shuffle=False,
    )
    return iter(DataLoader(dataset, batch_size=MICRO_BATCH_SIZE, sampler=sampler))


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Losses of one micro-batch, [b, s], and what turns them into the number to minimise."""
    batch = {name: value.to(device.current_device()) for name, value in next(batches).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(sum_losses, batch["loss_mask"])


def sum_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, how many tokens, what to report)."""
    total, count = (losses * loss_mask).sum(), loss_mask.sum().to(torch.int64)
    return total, count, {"lm loss": total.detach() / count}


def train(model: DistributedDataParallel) -> list[float]:
    """The loss of each step, on the ranks of the last pipeline stage."""
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, use_distributed_optimizer=True), [model])
    forward_backward, batches, losses = get_forward_backward_func(), build_data(), []
    for _ in range(NUM_STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        optimizer.step()
        losses.append(sum(report["lm loss"].item() for report in reports) / NUM_MICROBATCHES)
    return losses


def save(model: DistributedDataParallel, folder: Path) -> None:
    """Write the weights in a form that every layout can read."""
    dist_checkpointing.save(model.module.sharded_state_dict(prefix=""), str(folder))


def load(model: DistributedDataParallel, folder: Path) -> None:
    """Read weights that any layout wrote."""
    state = dist_checkpointing.load(model.module.sharded_state_dict(prefix=""), str(folder))
    model.module.load_state_dict(state)


def main(folder: Path) -> None:
    initialize()
    model = build_model()
    losses = train(model)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for step, loss in enumerate(losses, start=1):
            print(f"step {step:2d}  loss {loss:.4f}")
    torch.distributed.barrier()
    save(model, folder)
    restored = build_model()
    load(restored, folder)
    for (name, ours), theirs in zip(model.module.named_parameters(), restored.module.parameters()):
        if not torch.equal(ours, theirs):
            raise RuntimeError(f"{name} came back from {folder} with other values")
    if torch.distributed.get_rank() == 0:
        print(f"saved to {folder} and loaded back: the weights are equal")
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
