"""What every data-parallel wrapper offers to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _BaseDataParallel(torch.nn.Module):
    """Wraps `module` without a trace in checkpoints: parameter names are the module's own.

    The methods are those of a wrapper that has nothing to reduce; subclasses override what they do.
    """

    def __init__(self, config: TransformerConfig, module: torch.nn.Module) -> None:
        super().__init__()
        self.config = config
        self.module: Any = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*inputs, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward only accumulates; the reduction waits for the last microbatch outside."""
        yield

    def start_grad_sync(self, *unused: Any) -> None:
        """Begin to reduce the gradients over data-parallel ranks."""

    def finish_grad_sync(self) -> None:
        """Wait until the gradients are reduced."""

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiply all gradients in place."""

    def report_bad_gradients_to(self, complain: Callable[[str], None]) -> None:
        """Tell `complain` about gradients that are not finite, instead of raising; only where they are checked."""

    def zero_grad_buffer(self) -> None:
        """Zero all gradients; call at the start of every step."""

    def finish_param_sync(self) -> None:
        """Afterwards every rank has all weights that the wrapper spreads over ranks."""

    def broadcast_params(self) -> None:
        """Give all data-parallel replicas the weights of the first one."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hand the activations of the previous pipeline stage to the module."""
        self.module.set_input_tensor(input_tensor)

    def set_is_first_microbatch(self) -> None:
        """Tell the module that a new step begins."""
        self.module.set_is_first_microbatch()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's, without a prefix for the wrapper."""
        return self.module.state_dict(*args, **kwargs)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The module's state dict as the `torch` checkpoint format stores it."""
        return self.module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's description of its shards."""
        return self.module.sharded_state_dict(prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)
