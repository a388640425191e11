"""softmax(scale * x) under a mask: the middle of unfused attention. Masked positions (mask True) count as
-10000."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.transformer.enums import AttnMaskType

MASKED = -10000.0


class _ScaledSoftmax(torch.autograd.Function):
    """softmax(scale * x) computed in fp32; only the result is kept for backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        scaled = inputs.float() * scale  # new memory, so what follows may change it
        if mask is not None:
            scaled.masked_fill_(mask, MASKED)
        probs = torch.softmax(scaled, dim=-1).to(inputs.dtype)
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (probs,) = ctx.saved_tensors
        probs, dtype = probs.float(), grad_output.dtype
        grad = torch.ops.aten._softmax_backward_data(grad_output.float(), probs, -1, torch.float32)
        # A masked score is a constant: its probability is exactly zero, so its gradient already is. Rows without any
        # seen key are the exception; attention lets no gradient into them.
        return (grad * ctx.scale).to(dtype), None, None


class ScaledUpperTriangMaskedSoftmax(torch.autograd.Function):
    """Causal softmax of [n, s, s]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: float) -> Tensor:
        mask = _causal_mask(inputs.size(-2), inputs.size(-1), inputs.device)
        return _ScaledSoftmax.forward(ctx, inputs, mask, scale)

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None]:
        return _ScaledSoftmax.backward(ctx, output_grads)[0], None


class ScaledMaskedSoftmax(torch.autograd.Function):
    """Softmax of [b, a, s, s] under a mask that broadcasts to it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return _ScaledSoftmax.forward(ctx, inputs, mask, scale)

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None, None]:
        return _ScaledSoftmax.backward(ctx, output_grads)


class ScaledSoftmax(torch.autograd.Function):
    """Softmax of [b, a, s, s] without mask."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: float) -> Tensor:
        return _ScaledSoftmax.forward(ctx, inputs, None, scale)

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor, None]:
        return _ScaledSoftmax.backward(ctx, output_grads)[0], None


class FusedScaleMaskSoftmax(nn.Module):
    """softmax(scale * x) under a mask.

    Args:
        input_in_fp16: inputs are fp16.
        input_in_bf16: inputs are bf16.
        attn_mask_type: `causal` makes the causal mask when none is given.
        scaled_masked_softmax_fusion: use the form that keeps one tensor for backward.
        mask_func: applies a mask to scores, in the other form.
        softmax_in_fp32: compute in fp32 in the other form too.
        scale: factor on the scores, None for 1.

    Raises:
        ValueError: both half precisions at once, or a scale on half-precision scores.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: AttnMaskType,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None,
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise ValueError("the input cannot be fp16 and bf16 at once")
        if scale is not None and not softmax_in_fp32:
            raise ValueError("attention_softmax_in_fp32 must be on where the scores are scaled inside the softmax")
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, a, sq, sk] scores -> probabilities; a mask is True where a key is hidden."""
        sq, sk = input.shape[-2:]
        if mask is None and self.attn_mask_type == AttnMaskType.causal and sq > 1:
            mask = _causal_mask(sq, sk, input.device)
        if self.scaled_masked_softmax_fusion:
            return _ScaledSoftmax.apply(input, mask, 1.0 if self.scale is None else self.scale)
        return self.forward_torch_softmax(input, mask)

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """The same by plain torch operations."""
        scores = input.float() if self.softmax_in_fp32 else input
        if self.scale is not None:
            scores = scores * self.scale
        if mask is not None:
            scores = self.mask_func(scores, mask) if self.mask_func else scores.masked_fill(mask, MASKED)
        return torch.softmax(scores, dim=-1).to(input.dtype)


def _causal_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    """[sq, sk], True where the key is later than the query; the queries are the last positions."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).triu_(sk - sq + 1)
