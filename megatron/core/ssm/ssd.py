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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 19
"""On a CPU as many chunks are computed at a time as keep their Q x Q matrices about this large: within a cache."""


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
    length = x.size(0)
    size = min(chunk_size, length)
    padding = -length % size
    if padding:  # of tokens with dt = 0, which change no state
        x, dt, B, C = (F.pad(part, (0, 0) * (part.dim() - 1) + (0, padding)) for part in (x, dt, B, C))
    y, state = _ChunkedScan.apply(x, dt, A, B, C, size, recompute)
    return (y[:length] if padding else y), state


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


class _ChunkedScan(torch.autograd.Function):
    """`chunked_scan` of whole chunks, with a backward that needs no derivative of the Q x Q decays.

    With u = dt x and a the running sum of dt A within a chunk, the gradient of a_i is dy_i·y_i - u_i·du_i: what a_i
    multiplies, less what it divides. What a token says to itself is left out of both: it fades with nothing, and where
    the rest fades fast, its two sides would cancel to noise.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, size: int, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        form = _Form(x, B, size)
        dt_c = form.heads_first(dt.unsqueeze(-1)).squeeze(-2)  # [c, b, g, r, Q]
        u = form.heads_first(x).mul_(dt_c.unsqueeze(-2))  # [c, b, g, r, p, Q]
        b, c = form.groups_first(B), form.groups_first(C)  # [c, b, g, n, Q]
        a = torch.cumsum(dt_c * A.view(form.g, form.r, 1), dim=-1)
        states, last = _carry(a, _states_of_chunks(form, u, a, b))  # at the begin of each chunk
        y = torch.empty_like(u)  # without what a token says to itself
        kept = []
        for part in form.blocks():
            scores, decay = _scores(b[part], c[part]), _decay(a[part])
            within = torch.matmul(u[part], decay * scores.unsqueeze(3))
            from_before = torch.matmul(states[part].flatten(3, 4), c[part]).view_as(within)
            y[part] = within.add_(from_before.mul_(a[part].exp().unsqueeze(-2)))
            kept += [] if recompute else [scores, decay]
        result = form.tokens_first(torch.addcmul(y, u, _own_scores(b, c)))
        ctx.form = form
        ctx.save_for_backward(x, dt_c, A, b, c, a, states, y, *kept)
        final = last.flatten(1, 2)
        ctx.mark_non_differentiable(final)
        return result, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, b, c, a, states, y, *kept = ctx.saved_tensors
        form: _Form = ctx.form
        u = form.heads_first(x).mul_(dt.unsqueeze(-2))
        dy = form.heads_first(grad_y)
        left = (a[..., -1:] - a).exp().unsqueeze(-2)  # what is left of each token at the chunk's end
        faded = dy * a.exp().unsqueeze(-2)
        d_ends = _carry_back(a, torch.matmul(faded.flatten(3, 4), c.mT).view_as(states))  # of states at the ends
        # within chunks
        du, db, dc = torch.empty_like(u), torch.empty_like(b), torch.empty_like(c)
        for i, part in enumerate(form.blocks()):
            scores = kept[2 * i] if kept else _scores(b[part], c[part])
            decay = kept[2 * i + 1] if kept else _decay(a[part])
            du[part] = torch.matmul(dy[part], (decay * scores.unsqueeze(3)).mT)
            d_mixing = torch.matmul(u[part].mT, dy[part])
            own = d_mixing.diagonal(dim1=-2, dim2=-1).sum(3)
            d_scores = torch.mul(d_mixing, decay, out=d_mixing).sum(3)  # [c, b, g, Q (from), Q (to)]
            d_scores.diagonal(dim1=-2, dim2=-1).add_(own)
            torch.matmul(c[part], d_scores.mT, out=db[part])
            torch.matmul(b[part], d_scores, out=dc[part])
        da = (dy * y).sum(-2) - (u * du).sum(-2)  # [c, b, g, r, Q]
        # what tokens leave at the chunk's end: decays over all that follow in it, and that of what was there before
        asked = torch.matmul(d_ends.flatten(3, 4), b).view_as(u).mul_(left)
        to_end = (u * asked).sum(-2)
        before = a[..., -1].exp() * (states * d_ends).sum((-2, -1))
        da[..., :-1] -= to_end[..., :-1]
        da[..., -1] += to_end[..., :-1].sum(-1) + before
        db.add_(torch.matmul(d_ends.flatten(3, 4).mT, (u * left).flatten(3, 4)))
        dc.add_(torch.matmul(states.flatten(3, 4).mT, faded.flatten(3, 4)))
        du.add_(asked).addcmul_(dy, _own_scores(b, c))
        # a is a running sum: what changes at a token changes at all that follow.
        d_steps = da.flip(-1).cumsum(-1).flip(-1)
        grad_dt = d_steps * A.view(form.g, form.r, 1)
        grad_dt += (du * form.heads_first(x)).sum(-2)
        return (
            form.tokens_first(du.mul_(dt.unsqueeze(-2))),
            form.tokens_first(grad_dt.unsqueeze(-2)).squeeze(-1),
            (d_steps * dt).sum((0, 1, 4)).flatten(),
            form.to_tokens_of_groups(db),
            form.to_tokens_of_groups(dc),
            None,
            None,
        )


class _Form:
    """Sizes, and the order of dimensions in which products are taken: tokens of a chunk last."""

    def __init__(self, x: Tensor, B: Tensor, size: int) -> None:
        s, self.b, h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.r, self.size, self.chunks = h // self.g, size, s // size
        per_chunk = self.b * h * size * size
        self.at_a_time = self.chunks if x.device.type != "cpu" else max(1, BLOCK_ELEMENTS // per_chunk)

    def blocks(self) -> list[slice]:
        """The chunks that are computed at a time."""
        return [slice(i, i + self.at_a_time) for i in range(0, self.chunks, self.at_a_time)]

    def heads_first(self, x: Tensor) -> Tensor:
        """A copy [c, b, g, r, p, Q] of [s, b, h, p]."""
        parts = x.reshape(self.chunks, self.size, self.b, self.g, self.r, -1)
        return parts.permute(0, 2, 3, 4, 5, 1).clone(memory_format=torch.contiguous_format)

    def groups_first(self, x: Tensor) -> Tensor:
        """[c, b, g, n, Q] of [s, b, g, n]."""
        return x.reshape(self.chunks, self.size, self.b, self.g, -1).permute(0, 2, 3, 4, 1).contiguous()

    def tokens_first(self, x: Tensor) -> Tensor:
        """Inverse of `heads_first`."""
        return x.permute(0, 5, 1, 2, 3, 4).reshape(self.chunks * self.size, self.b, self.g * self.r, -1)

    def to_tokens_of_groups(self, x: Tensor) -> Tensor:
        """Inverse of `groups_first`."""
        return x.permute(0, 4, 1, 2, 3).reshape(self.chunks * self.size, self.b, self.g, -1)


def _scores(b: Tensor, c: Tensor) -> Tensor:
    """[c, b, g, Q (from), Q (to)]: B_j·C_i."""
    return torch.matmul(b.mT, c)


def _own_scores(b: Tensor, c: Tensor) -> Tensor:
    """[c, b, g, 1, 1, Q]: B_i·C_i."""
    return (b * c).sum(-2)[..., None, None, :]


def _decay(a: Tensor) -> Tensor:
    """[c, b, g, r, Q (from), Q (to)]: exp(a_i - a_j) for tokens i after j, zero for the others."""
    size = a.size(-1)
    hidden = torch.ones(size, size, dtype=torch.bool, device=a.device).tril_()  # [from, to], to <= from
    difference = a.unsqueeze(-2) - a.unsqueeze(-1)
    return difference.masked_fill_(hidden, -torch.inf).exp_()


def _states_of_chunks(form: _Form, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[c, b, g, r, p, n]: what the tokens of each chunk alone leave at its end."""
    left = (a[..., -1:] - a).exp_().unsqueeze(-2)
    return torch.matmul((u * left).flatten(3, 4), b.mT).unflatten(3, (form.r, form.p))


def _carry(a: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(states at the chunks' begins, in the memory of `own`; the state after the last chunk)."""
    whole = a[..., -1].exp()[..., None, None]  # [c, b, g, r, 1, 1]: decay over a chunk
    state = torch.zeros_like(own[0])
    for i in range(own.size(0)):
        following = torch.addcmul(own[i], whole[i], state)
        own[i] = state
        state = following
    return own, state


def _carry_back(a: Tensor, d_begin: Tensor) -> Tensor:
    """Gradients of the states at the chunks' ends, given what each chunk's tokens ask of the state at its begin; in
    the memory of `d_begin`."""
    whole = a[..., -1].exp()[..., None, None]
    gradient = torch.zeros_like(d_begin[0])
    for i in range(d_begin.size(0) - 1, -1, -1):
        preceding = torch.addcmul(d_begin[i], whole[i], gradient)
        d_begin[i] = gradient
        gradient = preceding
    return d_begin
