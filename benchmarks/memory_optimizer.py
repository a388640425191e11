"""Bytes that weights, gradients and optimizer state take for each parameter, counted, beside the published table.

    python benchmarks/memory_optimizer.py --output benchmarks/results/memory_optimizer.json

Counted is every tensor that is alive on a rank right after Adam's update, each piece of memory once, divided by the
number of parameters; the model is two linear layers, and no activation is alive at that time. Ranks run as gloo
processes. `d` is the number of data parallel ranks.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.harness import write_result
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Row:
    """A line of the table: types of weights and gradients, and bytes per parameter as `fixed + shared / d`."""

    params: str
    grads: str
    form: str
    """replicated, distributed (optimizer), aware (its precision-aware form) or fsdp2."""
    fixed: float
    shared: float
    settings: tuple[tuple[str, Any], ...] = ()
    """Further fields of `OptimizerConfig`."""

    @property
    def name(self) -> str:
        """Of the line."""
        return "-".join([self.params, self.grads, self.form, *self.types.values()])

    @property
    def types(self) -> dict[str, str]:
        """Of the state, where it is not float32."""
        return {k: str(v).removeprefix("torch.") for k, v in self.settings if k.endswith("_dtype")}


BF16_GRADS = (("main_grads_dtype", torch.bfloat16),)
FP16_MAIN = (("main_params_dtype", torch.float16),)


def moments(dtype: torch.dtype) -> tuple[tuple[str, Any], ...]:
    """Both of one type."""
    return ("exp_avg_dtype", dtype), ("exp_avg_sq_dtype", dtype)


ROWS = (
    Row("float16", "float16", "replicated", 20, 0),
    Row("bfloat16", "float32", "replicated", 18, 0),
    Row("float32", "float32", "replicated", 16, 0),
    Row("float16", "float16", "distributed", 4, 16),
    Row("bfloat16", "float32", "distributed", 6, 12),
    Row("float32", "float32", "distributed", 8, 8),
    # Ours: the kept fp32 rows are the main parameters; gradients and both moments are cut, too.
    Row("bfloat16", "float32", "fsdp2", 0, 16),
    Row("float32", "float32", "fsdp2", 0, 16),
    # Precision-aware, with remainders for main parameters unless they are fp16; a scale for each 256 elements.
    Row("bfloat16", "float32", "aware", 6, 10),
    Row("bfloat16", "bfloat16", "aware", 4, 10, BF16_GRADS),
    Row("bfloat16", "bfloat16", "aware", 4, 6, (*BF16_GRADS, *moments(torch.bfloat16))),
    Row("bfloat16", "bfloat16", "aware", 4, 6 + 2 / 256, (*BF16_GRADS, *moments(torch.float16))),
    Row("bfloat16", "bfloat16", "aware", 4, 4 + 2 / 256, (*BF16_GRADS, *moments(torch.uint8))),
    Row("bfloat16", "bfloat16", "aware", 4, 4 + 3 / 256, (*BF16_GRADS, *FP16_MAIN, *moments(torch.uint8))),
    Row("float16", "float32", "aware", 6, 12),
    Row("float32", "float32", "aware", 8, 4, moments(torch.bfloat16)),
)


def live_storages() -> dict[int, int]:
    """Address -> bytes of the memory of every tensor that is alive, each piece once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    found = {}
    for tensor in tensors:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            local = getattr(part, "_local_tensor", part)
            if local is not None and local.device.type != "meta":
                storage = local.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def bytes_per_parameter(row: Row, width: int) -> float:
    """Of this rank, right after the update of a step. All ranks of the data parallel group call it."""
    before = set(live_storages())
    dtype = getattr(torch, row.params)
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)).to(dtype)
    num_parameters = sum(param.numel() for param in model.parameters())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    is_split = row.form in ("distributed", "aware")
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=row.grads == "float32", use_distributed_optimizer=is_split
    )
    chunk: Any
    if row.form == "fsdp2":
        chunk = TorchFullyShardedDataParallel(config, ddp_config, model, sub_modules_to_wrap=(nn.Linear,))
    else:
        chunk = DistributedDataParallel(config, ddp_config, model)
    settings: dict[str, Any] = {"fp16": row.params == "float16", "bf16": row.params == "bfloat16"}
    settings.update(lr=1e-3, params_dtype=dtype, use_distributed_optimizer=is_split)
    settings.update(row.settings, use_precision_aware_optimizer=row.form == "aware")
    if row.params == "float16":
        settings["initial_loss_scale"] = 1.0
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings), [chunk])
    counted: list[float] = []

    def count(*unused: Any) -> None:
        counted.append(sum(size for address, size in live_storages().items() if address not in before))

    optimizer.optimizer.register_step_post_hook(count)
    for _ in range(2):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        optimizer.scale_loss(chunk(torch.ones(1, width, dtype=dtype)).float().mean()).backward()
        chunk.finish_grad_sync()
        assert optimizer.step()[0], "the step was skipped"
    return counted[-1] / num_parameters


def run_rank(rank: int, size: int, width: int, port: int, result: Any) -> None:
    """One data parallel rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel()
    for row in ROWS:
        found = torch.tensor(bytes_per_parameter(row, width))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        if rank == 0:
            line = {k: v for k, v in asdict(row).items() if k != "settings"} | {"state": row.types}
            result.append({**line, "d": size, "bytes": float(found), "table": row.fixed + row.shared / size})
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each measurement."""
    print(f"{'weights':9} {'gradients':9} {'form':12} {'d':>2} {'bytes/parameter':>16} {'table':>7}  state")
    for row in rows:
        print(
            f"{row['params']:9} {row['grads']:9} {row['form']:12} {row['d']:2} {row['bytes']:16.3f} {row['table']:.3f}",
            *(f"{name}={dtype}" for name, dtype in row["state"].items()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768, help="of the two square layers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="numbers of data parallel ranks")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with mp.Manager() as manager:
        for size in args.sizes:
            result = manager.list()
            mp.spawn(run_rank, (size, args.width, 29700 + size, result), nprocs=size)
            rows.extend(result)
    show(rows)
    if args.output:
        write_result(args.output, width=args.width, rows=rows)


if __name__ == "__main__":
    main()
