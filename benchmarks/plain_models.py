"""The models of `gpu.py` in plain torch: what a user would write instead, for `torch.compile` and autocast.

Residual blocks in the order of a pattern, as of --hybrid-override-pattern: `*` attention, `-` feed-forward, `E`
experts, `M` a Mamba-2 mixer. Attention is torch's scaled_dot_product_attention. No dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Rotary(nn.Module):
    """Angles of rotary positions (arXiv:2104.09864)."""

    def __init__(self, width: int, length: int, base: float) -> None:
        super().__init__()
        rates = base ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(length).float(), rates)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of x [b, a, s, d]."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * self.cos + turned * self.sin).to(x.dtype)


class Attention(nn.Module):
    """Causal, with grouped keys and values."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.heads, self.width = args.num_attention_heads, args.kv_channels
        self.groups = args.num_query_groups if args.group_query_attention else self.heads
        out = self.heads * self.width
        self.qkv = nn.Linear(args.hidden_size, out + 2 * self.groups * self.width, bias=args.add_bias_linear)
        self.proj = nn.Linear(out, args.hidden_size, bias=args.add_bias_linear)
        rotates = args.position_embedding_type == "rope"
        self.rotary = Rotary(self.width, args.seq_length, args.rotary_base) if rotates else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        sizes = [self.heads, self.groups, self.groups]
        qkv = self.qkv(x).view(b, s, sum(sizes), self.width).transpose(1, 2)
        q, k, v = qkv.split(sizes, dim=1)
        grouped = self.groups != self.heads
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True, enable_gqa=grouped)
        return self.proj(y.transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    """GELU, or SwiGLU (arXiv:2002.05202)."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.gated = args.swiglu
        inner = args.ffn_hidden_size
        self.fc1 = nn.Linear(args.hidden_size, inner * (1 + self.gated), bias=args.add_bias_linear)
        self.fc2 = nn.Linear(inner, args.hidden_size, bias=args.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated(self.fc1(x), self.gated))


def activated(x: Tensor, gated: bool) -> Tensor:
    """SwiGLU or GELU."""
    if not gated:
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """The best k of E feed-forward blocks for each token, tokens sorted by expert (arXiv:2101.03961)."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.top, self.gated = args.moe_router_topk, args.swiglu
        experts, inner, h = args.num_experts, args.moe_ffn_hidden_size, args.hidden_size
        self.router = nn.Linear(h, experts, bias=False)
        self.fc1 = nn.Parameter(torch.randn(experts, h, inner * (1 + self.gated)) * 0.02)
        self.fc2 = nn.Parameter(torch.randn(experts, inner, h) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).float().topk(self.top, dim=-1)
        weights = weights.softmax(-1).flatten()
        order = chosen.flatten().argsort()
        rows = tokens[order // self.top]
        counts = F.one_hot(chosen.flatten(), len(self.fc1)).sum(0)
        inner = activated(self._products(rows, self.fc1, counts), self.gated)
        outer = self._products(inner, self.fc2, counts) * weights[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, order // self.top, outer.to(tokens.dtype)).view_as(x)

    @staticmethod
    def _products(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        if rows.is_cuda and hasattr(torch, "_grouped_mm"):
            ends = counts.cumsum(0).to(torch.int32)
            return torch._grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends)
        parts = rows.split(counts.tolist())
        return torch.cat([part @ weight for part, weight in zip(parts, weights)])


class Mamba(nn.Module):
    """A Mamba-2 mixer in products of matrices, chunk by chunk (arXiv:2405.21060, section 6)."""

    CHUNK = 128

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.inner, self.width = 2 * args.hidden_size, args.mamba_head_dim
        self.heads, self.groups, self.state = self.inner // self.width, args.mamba_num_groups, args.mamba_state_dim
        mixed = self.inner + 2 * self.groups * self.state
        self.in_proj = nn.Linear(args.hidden_size, self.inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, 4, groups=mixed, padding=3)
        self.dt_bias, self.log_rate = nn.Parameter(torch.zeros(self.heads)), nn.Parameter(torch.zeros(self.heads))
        self.skip, self.norm = nn.Parameter(torch.ones(self.heads)), nn.RMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, args.hidden_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        b, s, _ = u.shape
        mixed = self.inner + 2 * self.groups * self.state
        z, xbc, dt = self.in_proj(u).split([self.inner, mixed, self.heads], dim=-1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :s].transpose(1, 2))
        x, B, C = xbc.split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        x = x.view(b, s, self.heads, self.width)
        repeat = self.heads // self.groups
        B, C = (t.view(b, s, self.groups, self.state).repeat_interleave(repeat, dim=2) for t in (B, C))
        dt = F.softplus(dt.float() + self.dt_bias)
        y = scan(x * dt.unsqueeze(-1).to(x.dtype), -dt * self.log_rate.exp(), B, C, min(self.CHUNK, s))
        y = y + self.skip.unsqueeze(-1) * x
        return self.out_proj(self.norm(y.reshape(b, s, -1) * F.silu(z)))


def scan(x: Tensor, decay: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """y [b, s, h, p] of H_t = exp(decay_t) H_{t-1} + x_t B_tᵀ, y_t = H_t C_t; x [b, s, h, p], B and C [b, s, h, n]."""
    b, s, h, _ = x.shape
    x, B, C = (t.view(b, s // chunk, chunk, h, -1).transpose(2, 3) for t in (x, B, C))  # [b, c, h, q, ...]
    total = decay.view(b, s // chunk, chunk, h).transpose(2, 3).float().cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    y = ((C @ B.transpose(-1, -2)) * within.to(x.dtype)) @ x
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    states = (x * to_end.to(x.dtype)).transpose(-1, -2) @ B  # [b, c, h, p, n]
    ends = total[..., -1].cumsum(1)  # [b, c, h]
    before = ends - total[..., -1]
    earlier = torch.ones(s // chunk, s // chunk, dtype=torch.bool, device=x.device).tril(-1)
    carried = (before.unsqueeze(2) - ends.unsqueeze(1)).masked_fill(~earlier[None, :, :, None], -torch.inf).exp()
    at_begin = torch.einsum("bijh,bjhpn->bihpn", carried.to(x.dtype), states)
    y = y + (C @ at_begin.transpose(-1, -2)) * total.exp().unsqueeze(-1).to(x.dtype)
    return y.transpose(2, 3).reshape(b, s, h, -1)


BLOCKS: dict[str, type[nn.Module]] = {"*": Attention, "-": FeedForward, "E": Experts, "M": Mamba}


def pattern_of(args: Any) -> str:
    """Its blocks in order."""
    if getattr(args, "model_family", None) == "mamba":
        return str(args.hybrid_override_pattern)
    return ("*E" if args.num_experts else "*-") * args.num_layers


class Layer(nn.Module):
    """x plus each of its blocks of the norm, one after the other."""

    def __init__(self, args: Any, symbols: str) -> None:
        super().__init__()
        norm = nn.RMSNorm if args.normalization == "RMSNorm" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(args.hidden_size) for _ in symbols)
        self.blocks = nn.ModuleList(BLOCKS[symbol](args) for symbol in symbols)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return x


class Head(nn.Module):
    """Mean loss of the output layer."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        norm = nn.RMSNorm if args.normalization == "RMSNorm" else nn.LayerNorm
        self.norm = norm(args.hidden_size)
        self.out = nn.Linear(args.hidden_size, args.padded_vocab_size, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.norm(x)).flatten(0, 1).float(), labels.flatten())


class PlainModel(nn.Module):
    """The model that the settings `args` describe: mean loss of (ids, labels), [b, s] each. Two blocks are a layer."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        h, pattern = args.hidden_size, pattern_of(args)
        self.recomputes = args.recompute_granularity == "full"
        self.embedding = nn.Embedding(args.padded_vocab_size, h)
        learned = args.position_embedding_type == "learned_absolute"
        self.positions = nn.Embedding(args.seq_length, h) if learned else None
        self.layers = nn.ModuleList(Layer(args, pattern[i : i + 2]) for i in range(0, len(pattern), 2))
        self.head = Head(args)
        for param in self.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.02)
        if not args.untie_embeddings_and_output_weights:
            self.head.out.weight = self.embedding.weight

    def parts_to_compile(self) -> list[nn.Module]:
        """Each layer, and what follows them."""
        return [*self.layers, self.head]

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.size(1)]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return self.head(x, labels)
