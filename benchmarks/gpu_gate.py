"""Whether what this device computes is right: every fused operation and attention back end beside fp64 on the CPU.

A check is a row of CHECKS: small inputs, our operation, the plain one. Both get the same values (those that the type
can hold); compared are the result and each gradient, by the norm of the difference over the norm of what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fp8.quantization import Quantized, largest_magnitude, quantize_blocks, quantize_tensor, scale_for
from megatron.core.fp8.recipes import Block
from megatron.core.fp8.scaled_product import has_kernel, scaled_product
from megatron.core.fusions import compiled
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.fusions.fused_layer_norm import layer_norm
from megatron.core.fusions.fused_rms_norm import rms_norm
from megatron.core.fusions.fused_rotary import RotatePairs
from megatron.core.fusions.fused_softmax import ScaledMaskedSoftmax, ScaledSoftmax, ScaledUpperTriangMaskedSoftmax
from megatron.core.fusions.linear_cross_entropy import linear_cross_entropy
from megatron.core.optimizer.fused_adam import AdamState, update
from megatron.core.optimizer.muon import COEFFICIENTS, orthogonalized
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.causal_conv import causal_conv
from megatron.core.ssm.ssd import chunked_scan
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.gemm import add_product, mixed_kernel_works
from megatron.core.transformer.attention_backends import build_core_attention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.moe.grouped_linear import grouped_kernel_works, grouped_linear
from megatron.core.transformer.moe.permutation import permute, unpermute
from megatron.core.transformer.transformer_config import TransformerConfig

Operation = Callable[..., Tensor]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of relative differences: sums of some hundred numbers in fp32, and a few roundings to 8 bits. TF32 is left off."""


@dataclass(frozen=True)
class Check:
    """An operation beside its plain form."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its inputs, which are standard normal."""
    ours: Operation
    plain: Operation
    types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    missing: Callable[[str], str | None] = lambda device: None
    """What it lacks on a device; None: nothing."""
    instead: Callable[[str, torch.dtype], str] = lambda device, dtype: ""
    """What is done in place of a kernel that a device lacks; empty: it has one."""


@dataclass
class Outcome:
    """Of one check in one type."""

    name: str
    type: str
    difference: float | None = None
    tolerance: float | None = None
    said: str = ""
    """Why there is no difference to speak of, or of something else than was to be tried."""

    @property
    def passed(self) -> bool:
        """Right, or not there to be tried."""
        if self.difference is None:
            return self.said.startswith("missing")
        return self.difference <= (self.tolerance or 0.0)


# --- operations -----------------------------------------------------------------------------------------


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def gated(function: Operation) -> Operation:
    def plain(x: Tensor, bias: Tensor) -> Tensor:
        gate, up = (x + bias).chunk(2, dim=-1)
        return function(gate) * up

    return plain


GELU: Operation = partial(F.gelu, approximate="tanh")


def angles(x: Tensor) -> Tensor:
    """[s, 1, 1, d/2] for x [s, b, a, d]."""
    rates = 0.5 ** torch.arange(x.size(-1) // 2, device=x.device, dtype=torch.float32)
    return (torch.arange(x.size(0), device=x.device).unsqueeze(-1) * rates)[:, None, None]


def rotated(x: Tensor) -> Tensor:
    cos, sin = angles(x).double().cos(), angles(x).double().sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_softmax(x: Tensor) -> Tensor:
    later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return (0.5 * x).masked_fill(later, -torch.inf).softmax(-1)


def hidden_later(x: Tensor) -> Tensor:
    return torch.ones(1, 1, *x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)


def targets(logits: Tensor) -> Tensor:
    """[s, b], the same on every device."""
    count = logits.shape[0] * logits.shape[1]
    return (torch.arange(count, device=logits.device) * 7 % logits.size(-1)).view(logits.shape[:2])


def targets_of(x: Tensor, weight: Tensor) -> Tensor:
    """`targets` of the logits that these give."""
    return targets(x.new_empty(1).expand(*x.shape[:2], weight.size(0)))


def plain_losses(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets(logits).flatten(), reduction="none").view(logits.shape[:2])


SPLITS = [5, 0, 9, 2]
"""Rows of each expert."""


def plain_groups(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([rows @ matrix.t() for rows, matrix in zip(x.split(SPLITS), weight)])


def routed(x: Tensor) -> Tensor:
    """Which of 4 experts get each token."""
    tokens = torch.arange(x.size(0), device=x.device).unsqueeze(-1)
    experts = torch.arange(4, device=x.device)
    return (tokens + experts) % 3 == 0


def there_and_back(x: Tensor) -> Tensor:
    rows, _, source = permute(x, routed(x))
    return unpermute(rows * 2, source, x.size(0))


def our_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return chunked_scan(x, F.softplus(dt), -A.abs(), B, C, 8)[0]


def plain_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Token by token."""
    dt, A = F.softplus(dt), -A.abs()
    B, C = (part.repeat_interleave(x.size(2) // part.size(2), dim=2) for part in (B, C))
    state, outputs = x.new_zeros(*x.shape[1:], B.size(-1)), []
    for t in range(x.size(0)):
        decay = (dt[t] * A).exp()[..., None, None]
        state = decay * state + (dt[t].unsqueeze(-1) * x[t]).unsqueeze(-1) * B[t].unsqueeze(-2)
        outputs.append((state * C[t].unsqueeze(-2)).sum(-1))
    return torch.stack(outputs)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.permute(1, 2, 0), (weight.size(-1) - 1, 0))
    return F.conv1d(padded, weight, bias, groups=x.size(-1)).permute(2, 0, 1)


def muon_direction(x: Tensor) -> Tensor:
    """What Newton and Schulz's iteration makes of the singular values of x, which is all it changes."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = sum(factor * values ** (2 * i + 1) for i, factor in enumerate(COEFFICIENTS))  # type: ignore[assignment]
    return left * values @ right


# --- attention ------------------------------------------------------------------------------------------

SEQUENCE, WIDTH = 48, 16
STARTS = (0, 11, 12, 48)
"""Where packed sequences begin."""


def our_attention(backend: AttnBackend, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[s, b, a * d] by the core that a layer would take."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=q.size(2) * WIDTH,
        num_attention_heads=q.size(2),
        num_query_groups=k.size(2),
        attention_dropout=0.0,
        attention_backend=backend,
        window_size=(7, 0) if kind == "window" else None,
        params_dtype=q.dtype,
        bf16=q.dtype == torch.bfloat16,
    )
    core = build_core_attention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    packed = None
    if kind == "packed":
        borders = torch.tensor(STARTS, dtype=torch.int32, device=q.device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=max(b - a for a, b in zip(STARTS, STARTS[1:])),
            max_seqlen_kv=max(b - a for a, b in zip(STARTS, STARTS[1:])),
        )
    return core(q, k, v, None, packed_seq_params=packed)


def plain_attention(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, mask, softmax, sum."""
    k, v = (part.repeat_interleave(q.size(2) // part.size(2), dim=2) for part in (k, v))
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    place = torch.arange(q.size(-2))
    distance = place.unsqueeze(-1) - place
    hidden = distance < 0
    if kind == "window":
        hidden |= distance > 7
    if kind == "packed":
        number = torch.bucketize(place, torch.tensor(STARTS[1:-1]), right=True)
        hidden |= number.unsqueeze(-1) != number
    scores = (q @ k.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def attention_checks() -> list[Check]:
    """Each back end with each kind of causal attention."""
    found = []
    for backend in (AttnBackend.auto, AttnBackend.flash, AttnBackend.fused, AttnBackend.unfused):
        for kind, groups in (("as many keys", 4), ("grouped", 2), ("window", 4), ("packed", 4)):
            batch = 1 if kind == "packed" else 2
            shapes = tuple((SEQUENCE, batch, heads, WIDTH) for heads in (4, groups, groups))
            ours, plain = partial(our_attention, backend, kind), partial(plain_attention, kind)
            found.append(Check(f"attention {backend.name}, {kind}", shapes, ours, plain))
    return found


# --- the table ------------------------------------------------------------------------------------------


HALF = (torch.bfloat16,)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS, SQUARES = (1, 128), (128, 128)
"""Blocks of activations and of weights that share a scale."""


def fp8_check(
    name: str,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    types: tuple[torch.dtype, torch.dtype],
    blocks: tuple[Block | None, Block | None],
    out_dtype: torch.dtype,
) -> Check:
    """a bᵀ of two matrices cast to `types`, with scales of `blocks` (None: of the whole), by the kernel that training
    uses, beside the product of the values that the casts stand for."""

    def parts(*inputs: Tensor) -> list[Quantized]:
        return [cast_to(x.detach().float(), kind, block) for x, kind, block in zip(inputs, types, blocks)]

    def plain(*inputs: Tensor) -> Tensor:
        a, b = (part.dequantized().double() for part in parts(*inputs))
        return a @ b.t()

    def instead(device: str, dtype: torch.dtype) -> str:
        known = has_kernel(device, *types, *blocks, out_dtype)
        return "" if known else "values restored to a wider type, no kernel for fp8"

    def ours(*inputs: Tensor) -> Tensor:
        a, b = parts(*inputs)
        return scaled_product(a, b, out_dtype)

    return Check(name, shapes, ours, plain, HALF, instead=instead)


def cast_to(x: Tensor, kind: torch.dtype, block: Block | None) -> Quantized:
    """In fp8."""
    if block is None:
        return quantize_tensor(x, kind, scale_for(largest_magnitude(x), kind))
    return quantize_blocks(x, kind, block, power_of_two=True)


def added_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """dyᵀ x where gradients add up."""
    total = torch.zeros(dy.size(1), x.size(1), device=x.device)
    add_product(total, dy.t(), x)
    return total


def compiled_region(function: Operation) -> Operation:
    return lambda *inputs: compiled.region(function)(*inputs)


def norm_region(x: Tensor, weight: Tensor) -> Tensor:
    return compiled.region(compiled.rms_norm)(x, weight, 1e-5, False)


def added_norm_region(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Sum and norm one after the other."""
    return torch.cat(
        compiled.region(compiled.added_norm(compiled.rms_norm))(x, None, residual, 0.0, True, weight, 1e-5, False)
    )


RATES = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def compiled_adam(main: Tensor, grad: Tensor, exp_avg: Tensor, root: Tensor) -> Tensor:
    """What the third update with half the gradient leaves, and how far bf16 weights are from it rounded."""
    state = AdamState(main, grad, exp_avg, root.square(), torch.full((), 2.0, device=main.device), main.bfloat16())
    update([state], RATES, 0.5, compile_it=True)
    assert state.weights is not None
    return torch.stack((main, exp_avg, state.exp_avg_sq, (state.weights - main.bfloat16()).float()))


def plain_adam(main: Tensor, grad: Tensor, exp_avg: Tensor, root: Tensor) -> Tensor:
    exp_avg = 0.9 * exp_avg + 0.05 * grad
    exp_avg_sq = 0.95 * root.square() + 0.05 * (grad / 2).square()
    step = exp_avg / (1 - 0.9**3) / ((exp_avg_sq / (1 - 0.95**3)).sqrt() + 1e-8)
    return torch.stack((main * (1 - 1e-3) - 1e-2 * step, exp_avg, exp_avg_sq, torch.zeros_like(main)))


X, GAIN, TWICE = (6, 2, 32), (32,), (64,)
SCORES, LOGITS = (2, 3, 8, 8), (6, 2, 40)
RECURRENCE = ((20, 2, 4, 8), (20, 2, 4), (4,), (20, 2, 2, 8), (20, 2, 2, 8))
FULL = (torch.float32,)
CHECKS: list[Check] = [
    Check(
        "LayerNorm",
        (X, GAIN, GAIN),
        lambda x, w, b: layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, GAIN, w, b, 1e-5),
    ),
    Check("RMSNorm", (X, GAIN), lambda x, w: rms_norm(x, w, 1e-5), normalized),
    Check("SwiGLU", ((6, 2, 64), TWICE), bias_swiglu_impl, gated(F.silu)),
    Check("GeGLU", ((6, 2, 64), TWICE), bias_geglu_impl, gated(GELU)),
    Check("GELU with bias", (X, GAIN), lambda x, b: bias_gelu_impl(x, b), lambda x, b: GELU(x + b)),
    Check(
        "bias, residual",
        (X, GAIN, X),
        lambda x, b, r: get_bias_dropout_add(True, True)((x, b), r, 0.0),
        lambda x, b, r: x + b + r,
    ),
    Check(
        "rotary positions",
        ((6, 2, 4, 8),),
        lambda x: RotatePairs.apply(x, angles(x).cos(), angles(x).sin(), False),
        rotated,
    ),
    Check("softmax", (SCORES,), lambda x: ScaledSoftmax.apply(x, 0.5), lambda x: (0.5 * x).softmax(-1)),
    Check(
        "softmax under a mask", (SCORES,), lambda x: ScaledMaskedSoftmax.apply(x, hidden_later(x), 0.5), causal_softmax
    ),
    Check("causal softmax", ((6, 8, 8),), lambda x: ScaledUpperTriangMaskedSoftmax.apply(x, 0.5), causal_softmax),
    Check("cross entropy", (LOGITS,), lambda x: vocab_parallel_cross_entropy(x, targets(x)), plain_losses),
    Check(
        "fused cross entropy", (LOGITS,), lambda x: fused_vocab_parallel_cross_entropy(x * 1, targets(x)), plain_losses
    ),
    Check(
        "output layer and loss in pieces",
        (X, (40, 32)),
        lambda x, w: linear_cross_entropy(x, w, targets_of(x, w)),
        lambda x, w: plain_losses(x @ w.t()),
    ),
    Check(
        "products of experts",
        ((16, 32), (4, 16, 32)),
        lambda x, w: grouped_linear(x, w, SPLITS),
        plain_groups,
        instead=lambda device, dtype: (
            "one product after the other, no kernel for groups"
            if dtype == torch.bfloat16 and not grouped_kernel_works(device, dtype)
            else ""
        ),
    ),
    Check("tokens to experts and back", ((12, 32),), there_and_back, lambda x: 2 * x * routed(x).sum(-1, keepdim=True)),
    Check("state space recurrence", RECURRENCE, our_scan, plain_scan, FULL),
    Check("causal convolution", ((20, 2, 16), (16, 1, 4), (16,)), causal_conv, plain_conv),
    Check("Muon's direction", ((24, 8),), lambda x: orthogonalized(x, 5), muon_direction, FULL),
    Check("compiled RMSNorm", (X, GAIN), norm_region, normalized),
    Check(
        "compiled residual and RMSNorm",
        (X, X, GAIN),
        added_norm_region,
        lambda x, residual, weight: torch.cat((x + residual, normalized(x + residual, weight))),
    ),
    Check("compiled SwiGLU", ((6, 2, 64), TWICE), compiled_region(compiled.activation(F.silu, True)), gated(F.silu)),
    *attention_checks(),
]
"""Every fused operation, then every attention back end."""

SUMS: list[Check] = [
    Check("compiled Adam", ((700,),) * 4, compiled_adam, plain_adam, FULL),
    Check(
        "weight gradients added in fp32",
        ((32, 16), (32, 24)),
        added_gradient,
        lambda x, dy: dy.t() @ x,
        instead=lambda device, dtype: (
            "product and sum one after the other, no kernel for mixed types"
            if dtype == torch.bfloat16 and not mixed_kernel_works(device, dtype, torch.float32)
            else ""
        ),
    ),
]
"""Only forward."""
PRODUCTS: list[Check] = [
    fp8_check("fp8 product, one scale", ((32, 64), (48, 64)), (E4M3, E4M3), (None, None), torch.bfloat16),
    fp8_check("fp8 input gradient, one scale", ((21, 50), (35, 50)), (E5M2, E4M3), (None, None), torch.bfloat16),
    fp8_check("fp8 weight gradient, one scale", ((32, 64), (48, 64)), (E5M2, E4M3), (None, None), torch.float32),
    fp8_check("fp8 product, scales of blocks", ((128, 256), (256, 256)), (E4M3, E4M3), (ROWS, SQUARES), torch.bfloat16),
    fp8_check("fp8 input gradient, blocks", ((200, 600), (264, 600)), (E5M2, E4M3), (ROWS, SQUARES), torch.bfloat16),
    fp8_check("fp8 weight gradient, blocks", ((264, 600), (200, 600)), (E5M2, E4M3), (ROWS, ROWS), torch.float32),
]
"""Only forward: the casts are inside. A kernel's sums keep fewer bits than fp32, and the result is rounded to bf16."""
FP8_TOLERANCE = 1e-2


# --- trying ---------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def tried(check: Check, dtype: torch.dtype, device: str, tolerance: float, gradients: bool = True) -> Outcome:
    """One check in one type; what goes wrong is said in the outcome."""
    outcome = Outcome(check.name, str(dtype).removeprefix("torch."), tolerance=tolerance)
    missing = check.missing(device)
    if missing is not None:
        outcome.said = f"missing: {missing}"
        return outcome
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in check.shapes]
    try:
        plain = [value.double().requires_grad_(gradients) for value in values]
        ours = [value.to(device).requires_grad_(gradients) for value in values]
        expected, found = check.plain(*plain), check.ours(*ours)
        pairs = [(found, expected)]
        if gradients:
            weight = torch.randn(expected.shape, generator=generator).to(dtype)
            expected.backward(weight.double())
            found.backward(weight.to(device, found.dtype))
            pairs += [(a.grad, b.grad) for a, b in zip(ours, plain)]  # type: ignore[misc]
        outcome.difference = max(relative(a, b) for a, b in pairs)
        outcome.said = check.instead(torch.device(device).type, dtype)
    except Exception as error:
        outcome.said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return outcome


def run_checks(device: str) -> Iterator[Outcome]:
    """All that are in the tables; process groups exist."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield from (tried(check, dtype, device, TOLERANCE[dtype]) for check in CHECKS for dtype in check.types)
    yield from (tried(check, dtype, device, TOLERANCE[dtype], False) for check in SUMS for dtype in check.types)
    yield from (tried(check, dtype, device, FP8_TOLERANCE, False) for check in PRODUCTS for dtype in check.types)
