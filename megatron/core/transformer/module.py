"""The base of every model part, and the wrapper that computes in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

HALF_TYPES = (torch.float16, torch.bfloat16)


def param_is_not_shared(param: Tensor) -> bool:
    """Whether no other pipeline stage holds this parameter too (counted once in norms)."""
    return not getattr(param, "shared", False)


class MegatronModule(nn.Module):
    """A module that knows its configuration and describes its parameters for a distributed checkpoint."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The state dict as the `torch` checkpoint format stores it."""
        return self.state_dict(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Own parameters, whole on every rank, together with what the children say of theirs.

        Args:
            prefix: goes before every key.
            sharded_offsets: axes to put in front of every tensor, as (axis, offset, size).
            metadata: how the checkpoint is to be made; handed on to the children.
        """
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, sharded_offsets=sharded_offsets)
        for name, child in self.named_children():
            sharded.update(sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata))
        return sharded

    def set_is_first_microbatch(self) -> None:
        """Tell modules that cache something for the duration of a step that a new one begins."""
        for module in self.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True  # type: ignore[assignment]

    def set_symmetric_ar(self, set_to: str | None = None) -> None:
        """Choose the symmetric-memory all-reduce of modules that have one."""
        for module in self.modules():
            if hasattr(module, "symmetric_ar_type"):
                module.symmetric_ar_type = set_to  # type: ignore[assignment]


def conversion_helper(val: Any, conversion: Callable[[Any], Any]) -> Any:
    """Apply `conversion` to every element of nested tuples and lists."""
    if isinstance(val, (tuple, list)):
        return type(val)(conversion_helper(element, conversion) for element in val)
    return conversion(val)


def fp32_to_float16(val: Any, float16_convertor: Callable[[Tensor], Tensor]) -> Any:
    """fp32 tensors in `val` converted by `float16_convertor`, all else as it is."""

    def convert(element: Any) -> Any:
        is_fp32 = isinstance(element, Tensor) and element.dtype == torch.float32
        return float16_convertor(element) if is_fp32 else element

    return conversion_helper(val, convert)


def float16_to_fp32(val: Any) -> Any:
    """Half precision tensors in `val` as fp32, all else as it is."""

    def convert(element: Any) -> Any:
        return element.float() if isinstance(element, Tensor) and element.dtype in HALF_TYPES else element

    return conversion_helper(val, convert)


class Float16Module(MegatronModule):
    """Runs `module` in fp16 or bf16: parameters are cast once, fp32 inputs of the first pipeline stage on the
    way in, half precision outputs of the last stage back to fp32 on the way out."""

    module: Any

    def __init__(self, config: TransformerConfig, module: nn.Module) -> None:
        super().__init__(config)
        if config.fp16 == config.bf16:
            raise ValueError(f"Float16Module needs one of fp16 and bf16, got fp16={config.fp16}, bf16={config.bf16}")
        self.half_type = torch.float16 if config.fp16 else torch.bfloat16
        self.module = module.to(self.half_type)
        self.fp16, self.bf16 = config.fp16, config.bf16
        self.vp_stage: int | None = getattr(module, "vp_stage", None)
        # A model knows which end of the pipeline it is; others are asked for by their rank.
        self.pre_process: bool | None = getattr(module, "pre_process", None)
        self.post_process: bool | None = getattr(module, "post_process", None)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        first, last = self.pre_process, self.post_process
        if first is None:
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=self.vp_stage)
        if last is None:
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=self.vp_stage)
        if first:
            inputs = fp32_to_float16(inputs, lambda tensor: tensor.to(self.half_type))
        outputs = self.module(*inputs, **kwargs)
        if last:
            outputs = float16_to_fp32(outputs)
        return outputs

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hand the activations of the previous stage to the model."""
        return self.module.set_input_tensor(input_tensor)

    def set_is_first_microbatch(self) -> None:
        self.module.set_is_first_microbatch()

    def state_dict(  # type: ignore[override]
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The wrapped module's, so that the wrapper leaves no trace in a checkpoint."""
        if destination is None:
            return self.module.state_dict(prefix=prefix, keep_vars=keep_vars)
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        return self.module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> ShardedStateDict:
        return self.module.sharded_state_dict(prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)
