"""The state space recurrence of Mamba-2 as products of matrices (Dao & Gu, arXiv:2405.21060, section 6).

For each head, with a state H of p x n numbers that starts at zero:

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_tᵀ        y_t = H_t C_t

The sequence is cut in chunks of Q tokens. Within a chunk y is a masked product of matrices, as attention is; what
comes from before enters through the state at the chunk's begin. States are carried from chunk to chunk one after the
other.

s sequence, b microbatch, h heads, g groups of heads that share B and C, r = h/g heads of a group, p head width,
n state width, c chunks of Q tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 16
"""On a CPU as many chunks are computed at a time as have Q x Q matrices of so many numbers together: all that is made
of them stays in a cache."""


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y [s, b, h, p], the state after the last token [b, h, p, n]); the state takes no part in backward.

    Args:
        x: [s, b, h, p]; all arguments have one type, fp32 or wider.
        dt: [s, b, h], not negative.
        A: [h], negative.
        B: [s, b, g, n].
        C: [s, b, g, n].
        chunk_size: Q; no influence on the result. `s` need not be a multiple of it.
        recompute: compute the Q x Q matrices again in backward instead of keeping them.
    """
    y, state = _ChunkedScan.apply(x, dt, A, B, C, chunk_size, recompute)
    return y, state


def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y [b, h, p] of one token more; changes `state` [b, h, p, n] in place.

    Args:
        x: [b, h, p].
        dt: [b, h].
        A: [h].
        B: [b, g, n].
        C: [b, g, n].
    """
    heads = x.size(1) // B.size(1)
    B, C = (part.repeat_interleave(heads, dim=1) for part in (B, C))  # [b, h, n]
    state.mul_(torch.exp(dt * A)[..., None, None])
    state.add_((dt[..., None] * x)[..., None] * B[:, :, None, :])
    return torch.einsum("bhpn,bhn->bhp", state, C)


def continue_from(state: Tensor, y: Tensor, final: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(y, the state after the last token) of a `chunked_scan` that begins from `state` instead of zero; changes y and
    `final`, which are of the scan from zero. Both are linear in the state: what it gives fades by the sum of dt A.

    Args:
        state: [b, h, p, n].
        y: [s, b, h, p].
        final: [b, h, p, n].
        dt: [s, b, h].
        A: [h].
        C: [s, b, g, n].
    """
    fading = (dt * A).cumsum(0).exp()  # [s, b, h]
    C = C.repeat_interleave(state.size(1) // C.size(2), dim=2)
    y.addcmul_(torch.einsum("bhpn,sbhn->sbhp", state, C), fading.unsqueeze(-1))
    final.addcmul_(state, fading[-1][..., None, None])
    return y, final


class _ChunkedScan(torch.autograd.Function):
    """`chunked_scan`, block by block of chunks, with a backward that needs no derivative of the Q x Q decays.

    With u = dt x and a the running sum of dt A within a chunk, the gradient of a_i is dy_i·y_i - u_i·du_i: what a_i
    multiplies, less what it divides. What a token says to itself is left out of both: it fades with nothing, and where
    the rest fades fast, its two sides would cancel to noise.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, size: int, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        heads, groups = x.size(2), B.size(2)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # without what a token says to itself
        result = torch.empty_like(y)
        state = x.new_zeros(x.size(1), groups, B.size(3), heads // groups, x.size(3))  # [b, g, n, r, p]
        kept = []
        blocks = _blocks(x, size)
        for block in blocks:
            part = _Chunks(block, x, dt, A, B, C)
            own = torch.matmul(part.b.mT, part.by_group(part.u * part.left)).unflatten(-1, state.shape[-2:])
            states, state = _carry(part.whole, own, state)
            scores, decay = part.scores(), _decay(part.a)
            within = part.of_heads(torch.matmul(decay * scores.unsqueeze(3), part.by_head(part.u)))
            from_before = part.of_groups(torch.matmul(part.c, states.flatten(-2)))
            so_far = part.cut_heads(y)
            torch.addcmul(within, from_before, part.faded, out=so_far)
            torch.addcmul(so_far, part.u, part.own_scores(), out=part.cut_heads(result))
            kept += [states] if recompute else [states, scores, decay]
        ctx.blocks = blocks
        ctx.save_for_backward(x, dt, A, B, C, y, *kept)
        final = state.permute(0, 1, 3, 4, 2).flatten(1, 2)
        ctx.mark_non_differentiable(final)
        return result, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, y, *kept = ctx.saved_tensors
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, dt, B, C)]
        grad_A, d_state = torch.zeros_like(A), torch.zeros_like(kept[0][0])
        for block in reversed(ctx.blocks):
            part = _Chunks(block, x, dt, A, B, C)
            count = len(kept) // len(ctx.blocks)
            matrices = kept[block.number * count : (block.number + 1) * count]
            d_state = _backward_of_block(part, grad_y, y, matrices, d_state, grads, grad_A)
        grad_x, grad_dt, grad_B, grad_C = grads
        return grad_x, grad_dt, grad_A, grad_B, grad_C, None, None


def _backward_of_block(
    part: _Chunks,
    grad_y: Tensor,
    y: Tensor,
    kept: list[Tensor],
    d_state: Tensor,
    grads: list[Tensor],
    grad_A: Tensor,
) -> Tensor:
    """Write the block's part of `grads` (of x, dt, B, C), add to `grad_A`; the gradient of the state at its begin.

    Args:
        kept: states at the chunks' begins; scores and decays if they are not to be computed again.
        d_state: gradient of the state at the block's end.
    """
    states, *matrices = kept
    scores, decay = matrices or (part.scores(), _decay(part.a))
    x, u, dt, dy = part.x, part.u, part.dt, part.cut_heads(grad_y)
    dy_by_head = part.by_head(dy)
    dy_x = (dy * x).sum(-1)  # [c, Q, b, g, r]
    # what tokens take from the state at the chunk's begin, and what they leave at its end
    faded = part.by_group(dy * part.faded)
    d_begins = torch.matmul(part.c.mT, faded).view_as(states)
    d_ends, d_begin = _carry_back(part.whole, d_begins, d_state)
    d_c = torch.matmul(faded, states.flatten(-2).mT)
    d_b = torch.matmul(part.by_group(u * part.left), d_ends.flatten(-2).mT)
    asked = part.of_groups(torch.matmul(part.b, d_ends.flatten(-2))) * part.left
    # within chunks
    du = part.of_heads(torch.matmul((decay * scores.unsqueeze(3)).mT, dy_by_head))
    d_scores = torch.matmul(dy_by_head, part.by_head(u).mT).mul_(decay).sum(3)  # [c, b, g, Q (to), Q (from)]
    d_scores.diagonal(dim1=-2, dim2=-1).add_((dy_x * dt).sum(-1).permute(0, 2, 3, 1))
    d_b += torch.matmul(d_scores.mT, part.c)
    d_c += torch.matmul(d_scores, part.b)
    # decays: a is a running sum, so that what changes at a token changes at all that follow
    x_du, x_asked = (du * x).sum(-1), (asked * x).sum(-1)
    to_end = x_asked * dt
    da = (dy * part.cut_heads(y)).sum(-1) - x_du * dt - to_end
    da[:, -1] += to_end.sum(1) + part.whole[..., 0, :, 0] * (states * d_ends).sum((3, 5))
    d_steps = da.flip(1).cumsum(1).flip(1)
    # of the arguments
    own_scores = part.own_scores()
    grad_x, grad_dt = (part.cut_heads(grad) for grad in grads[:2])
    grad_B, grad_C = (part.cut(grad) for grad in grads[2:])
    torch.add(du, asked, out=grad_x).addcmul_(dy, own_scores).mul_(dt.unsqueeze(-1))
    torch.addcmul(x_du + x_asked, dy_x, own_scores.squeeze(-1), out=grad_dt).addcmul_(d_steps, part.A)
    grad_A.view_as(part.A).add_((d_steps * dt).sum((0, 1, 2)))
    grad_B.copy_(d_b.permute(0, 3, 1, 2, 4))
    grad_C.copy_(d_c.permute(0, 3, 1, 2, 4))
    return d_begin


class _Block(NamedTuple):
    """Chunks of equal size that are computed at a time."""

    number: int
    begin: int
    end: int
    chunks: int


def _blocks(x: Tensor, size: int) -> list[_Block]:
    """All tokens; the last block has what is left of a chunk."""
    length, per_chunk = x.size(0), x.size(1) * x.size(2) * size * size
    whole = length // size
    most = max(whole, 1) if x.device.type != "cpu" else max(1, BLOCK_ELEMENTS // per_chunk)
    parts = [(i * size, min(i + most, whole) * size, min(most, whole - i)) for i in range(0, whole, most)]
    if length % size:
        parts.append((whole * size, length, 1))
    return [_Block(i, *part) for i, part in enumerate(parts)]


class _Chunks:
    """What a block has, in two orders of dimensions: tokens first, as it comes, and as products of matrices want it,
    which are views of the same memory."""

    def __init__(self, block: _Block, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        self.block, self.groups = block, B.size(2)
        self.x, self.dt = self.cut_heads(x), self.cut_heads(dt)  # [c, Q, b, g, r, p], [c, Q, b, g, r]
        self.A = A.view(self.groups, -1)
        self.b, self.c = (self.by_group(self.cut(part)) for part in (B, C))  # [c, b, g, Q, n]
        self.a = torch.cumsum((self.dt * self.A).permute(0, 2, 3, 4, 1), dim=-1)  # [c, b, g, r, Q]
        self.u = self.x * self.dt.unsqueeze(-1)
        by_token = self.a.permute(0, 4, 1, 2, 3).unsqueeze(-1)
        self.faded = by_token.exp()  # [c, Q, b, g, r, 1]: what is left at each token of the state at the chunk's begin
        self.left = (by_token[:, -1:] - by_token).exp_()  # and of each token at the chunk's end
        self.whole = self.faded[:, -1].unsqueeze(3).squeeze(-1).unsqueeze(-1)  # [c, b, g, 1, r, 1]: decay over a chunk

    def cut(self, x: Tensor) -> Tensor:
        """[c, Q, b, ...] of this block, of [s, b, ...]; a view."""
        return x[self.block.begin : self.block.end].unflatten(0, (self.block.chunks, -1))

    def cut_heads(self, x: Tensor) -> Tensor:
        """[c, Q, b, g, r, ...] of this block, of [s, b, h, ...]; a view."""
        return self.cut(x).unflatten(3, (self.groups, -1))

    def scores(self) -> Tensor:
        """[c, b, g, Q (to), Q (from)]: C_i·B_j."""
        return torch.matmul(self.c, self.b.mT)

    def own_scores(self) -> Tensor:
        """[c, Q, b, g, 1, 1]: C_i·B_i."""
        return (self.b * self.c).sum(-1).permute(0, 3, 1, 2)[..., None, None]

    @staticmethod
    def by_group(x: Tensor) -> Tensor:
        """[c, b, g, Q, ...] of [c, Q, b, g, ...], what follows in one dimension."""
        return x.flatten(4).permute(0, 2, 3, 1, 4)

    def of_groups(self, x: Tensor) -> Tensor:
        """[c, Q, b, g, r, p] of [c, b, g, Q, r p]."""
        return x.permute(0, 3, 1, 2, 4).unflatten(-1, self.x.shape[-2:])

    @staticmethod
    def by_head(x: Tensor) -> Tensor:
        """[c, b, g, r, Q, p] of [c, Q, b, g, r, p]."""
        return x.permute(0, 2, 3, 4, 1, 5)

    @staticmethod
    def of_heads(x: Tensor) -> Tensor:
        """Inverse of `by_head`."""
        return x.permute(0, 4, 1, 2, 3, 5)


def _decay(a: Tensor) -> Tensor:
    """[c, b, g, r, Q (to), Q (from)]: exp(a_i - a_j) for tokens i after j, zero for the others.

    These are cleared before, lest they overflow, and after; exponents of -inf would cost a CPU more than all others.
    """
    return (a.unsqueeze(-1) - a.unsqueeze(-2)).tril_(-1).exp_().tril_(-1)


def _carry(whole: Tensor, own: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(states at the chunks' begins [c, b, g, n, r, p], the one after the last of them).

    Args:
        whole: decay over each chunk, [c, b, g, 1, r, 1].
        own: what the tokens of each chunk alone leave at its end; changed.
        state: at the begin of the first.
    """
    begins = [state]
    for decay, left in zip(whole, own):
        begins.append(left.addcmul_(decay, begins[-1]))
    return _stacked(begins[:-1]), begins[-1]


def _carry_back(whole: Tensor, d_begin: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor]:
    """(gradients of the states at the chunks' ends, that of the state at the begin of the first).

    Args:
        whole: decay over each chunk.
        d_begin: what each chunk's tokens ask of the state at its begin; changed.
        d_state: gradient of the state after the last chunk.
    """
    ends = [d_state]
    for decay, asked in zip(whole.flip(0), reversed(d_begin.unbind())):
        ends.append(asked.addcmul_(decay, ends[-1]))
    return _stacked(ends[:-1][::-1]), ends[-1]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Along a new first dimension; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
