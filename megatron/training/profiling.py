"""The profiling window, `--profile` from `--profile-step-start` to `--profile-step-end`."""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import device
from megatron.training.utils import rank


class Profiler:
    """Profiles some iterations on some ranks; does nothing elsewhere.

    With --use-pytorch-profiler, and wherever the device is not CUDA, it writes a Chrome trace for TensorBoard into
    --tensorboard-dir. Else it switches the CUDA profiler (nsys) on and off and names ranges for it.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.is_on = bool(args.profile and rank() in args.profile_ranks)
        self.torch_profiler: Any = None
        self.cuda_ranges: Any = None

    def __enter__(self) -> Profiler:
        if self.is_on and (self.args.use_pytorch_profiler or device.device_type() != "cuda"):
            start, end = self.args.profile_step_start, self.args.profile_step_end
            self.torch_profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=max(start - 1, 0), warmup=1 if start > 0 else 0, active=end - start, repeat=1
                ),
                on_trace_ready=torch.profiler.tensorboard_trace_handler(self.args.tensorboard_dir or "profile"),
                record_shapes=True,
                with_stack=True,
            )
            self.torch_profiler.start()
        return self

    def step(self, iteration: int) -> None:
        """Tell the profiler that `iteration` (counted from 0) begins."""
        if not self.is_on:
            return
        if self.torch_profiler is not None:
            self.torch_profiler.step()
        elif iteration == self.args.profile_step_start:
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
            self.cuda_ranges = torch.autograd.profiler.emit_nvtx(record_shapes=True)
            self.cuda_ranges.__enter__()
        elif iteration == self.args.profile_step_end:
            self._stop_cuda()

    def _stop_cuda(self) -> None:
        if self.cuda_ranges is not None:
            self.cuda_ranges.__exit__(None, None, None)
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())
            self.cuda_ranges = None

    def __exit__(self, *exception: object) -> None:
        if self.torch_profiler is not None:
            self.torch_profiler.stop()
        self._stop_cuda()
