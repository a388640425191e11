"""The normalisation of a layer's input: LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.fusions import compiled
from megatron.core.fusions.fused_rms_norm import rms_norm
from megatron.core.tensor_parallel.initialization import parameter_device, register_parameter_init
from megatron.core.transformer.transformer_config import TransformerConfig


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """x [..., h] with mean 0 and variance 1 in each row, times gamma, plus beta; statistics in fp32.

    Args:
        zero_centered: `weight` is gamma - 1.
    """
    shape = (x.size(-1),)
    if not zero_centered:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    # fp32: in bf16 1 + weight would round away what is small about weight. CPU kernels mix types.
    wide = x if x.device.type == "cpu" else x.float()
    return torch.nn.functional.layer_norm(wide, shape, weight.float() + 1.0, bias.float(), eps).to(x.dtype)


class FusedLayerNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as `config.normalization` says.

    Output has the parameters' type, also for an fp32 residual stream. Under sequence parallelism x is [s/tp,
    b, h] and the parameters' gradients are parts of a sum over the tensor parallel ranks (attribute
    `sequence_parallel`).

    Args:
        hidden_size: length h of the last dimension.
        eps: added to the variance.
        persist_layer_norm: kept for the public interface; torch chooses the kernel.
        zero_centered_gamma: learn gamma - 1; also on by `config.layernorm_zero_centered_gamma`.
        normalization: kept for the public interface; `config.normalization` decides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = True,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma or config.layernorm_zero_centered_gamma
        self.is_rms_norm = _is_rms_norm(config.normalization)
        self.weight = self._parameter(nn.init.zeros_ if self.zero_centered_gamma else nn.init.ones_)
        self.bias = None if self.is_rms_norm else self._parameter(nn.init.zeros_)

    def _parameter(self, init_method: object) -> nn.Parameter:
        config = self.config
        param = nn.Parameter(torch.empty(self.hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        register_parameter_init(param, init_method, perform_initialization=config.perform_initialization)  # type: ignore[arg-type]
        return param

    @property
    def _region(self) -> Callable[..., Tensor]:
        return compiled.rms_norm if self.bias is None else compiled.layer_norm

    @property
    def adds(self) -> bool:
        """Whether `forward` takes what is to be added first."""
        return self.config.torch_compile and compiled.compiles(self._region, compiled.bias_dropout_add)

    def forward(self, input: Tensor, added: tuple[Any, ...] | None = None) -> Any:
        """The norm of `input`; or, given `added` as the further arguments of `compiled.bias_dropout_add`, (that sum,
        the norm of the sum). Through the module, because others wait for its weights by hooks."""
        if self.config.torch_compile and compiled.compiles(self._region):
            parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
            settings = (*parameters, self.eps, self.zero_centered_gamma)
            if added is not None:
                return compiled.region(compiled.added_norm(self._region))(input, *added, *settings)
            return compiled.region(self._region)(input, *settings)
        if self.bias is None:
            output = rms_norm(input, self.weight, self.eps, self.zero_centered_gamma)
        elif input.dtype == self.weight.dtype:
            output = layer_norm(input, self.weight, self.bias, self.eps, self.zero_centered_gamma)
        else:
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            output = layer_norm(input, weight, bias, self.eps, self.zero_centered_gamma)
        return output.to(self.weight.dtype)

    def extra_repr(self) -> str:
        kind = "RMSNorm" if self.is_rms_norm else "LayerNorm"
        return f"{self.hidden_size}, {kind}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


def _is_rms_norm(normalization: str) -> bool:
    if normalization not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"normalization must be LayerNorm or RMSNorm, not {normalization!r}")
    return normalization == "RMSNorm"
