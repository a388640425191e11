"""Choosing the next token from logits. b rows, v vocabulary, k candidates.

A row's token depends on its logits, its settings and its own random stream; never on the other rows. It is the inverse
of the cumulative distribution, tokens in the order of their numbers, at one uniform number: a last bit of the logits
that differs, as it does between batches of different size, moves the borders between tokens by as little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.core.inference.sampling_params import SamplingParams

COLDEST = 1e-6
"""Temperature below which there would be infinities; the most likely token is drawn long before."""

FEW = 1024
"""Candidates looked at before all are sorted: a nucleus has seldom more."""


@dataclass
class Draw:
    """What one row draws by."""

    params: SamplingParams
    generator: torch.Generator
    """On the CPU, so that a seed means the same text on every device."""

    history: Sequence[int] = field(default=())
    """Tokens so far, for the repetition penalty."""

    num_generated: int = 0


def generator_of(seed: int) -> torch.Generator:
    """A request's random stream."""
    return torch.Generator().manual_seed(seed)


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[b] int64 on the CPU: the next token of each row.

    Args:
        logits: [b, v], any float type; columns of padding tokens are cut off already.
        draws: one a row; greedy rows take nothing from their generators.
    """
    logits = logits.float()
    if all(draw.params.is_plain_argmax for draw in draws):
        return argmax(logits).cpu()
    rows = logits.cpu()
    return torch.tensor([_draw_one(row, draw) for row, draw in zip(rows, draws)], dtype=torch.int64)


BLOCK = 256
"""Logits of which the greatest is found at once."""


def argmax(logits: Tensor) -> Tensor:
    """[b] int64: the first greatest one of each row [v].

    On a CPU the greatest values of blocks are found first, because torch compares numbers without their places ten
    times as fast.
    """
    size = logits.size(1) // BLOCK * BLOCK
    if logits.device.type != "cpu" or size == 0:
        return logits.argmax(dim=-1)
    blocks = logits[:, :size].unflatten(1, (-1, BLOCK))
    tops = blocks.amax(-1)
    if size < logits.size(1):
        tops = torch.cat([tops, logits[:, size:].amax(-1, keepdim=True)], 1)
    first = tops.argmax(-1)
    places = first[:, None] * BLOCK + torch.arange(BLOCK)
    inside = logits.gather(1, places.clamp_(max=logits.size(1) - 1))  # the last number again and again is never first
    return first * BLOCK + inside.argmax(-1)


def _draw_one(logits: Tensor, draw: Draw) -> int:
    """The token that one row [v] of logits gives."""
    params = draw.params
    logits = penalized(logits, draw.history, params.repetition_penalty)
    logits = without_forbidden(logits, draw.history, params.forbidden_pairs)
    if params.is_greedy:
        return int(logits.argmax())
    logits = logits / max(params.temperature, COLDEST)
    values, tokens = candidates(logits, params.top_k, params.nucleus(draw.num_generated))
    if params.min_p:
        likely = values >= values.max() + torch.tensor(params.min_p).log()
        values, tokens = values[likely], tokens[likely]
    tokens, order = tokens.sort()
    distribution = (values[order] - values.max()).double().exp().cumsum(0)
    level = torch.rand((), generator=draw.generator, dtype=torch.float64) * distribution[-1]
    place = int(torch.searchsorted(distribution, level, right=True))
    return int(tokens[min(place, len(tokens) - 1)])


def penalized(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """[v] with the logits of tokens in `history` made less likely (arXiv:1909.05858, section 4.1)."""
    if penalty == 1 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    values = logits[seen]
    logits = logits.clone()
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def without_forbidden(logits: Tensor, history: Sequence[int], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """[v] without the tokens that may not follow the last one of `history`."""
    forbidden = [after for before, after in pairs if history and before == history[-1]]
    if not forbidden:
        return logits
    logits = logits.clone()
    logits[forbidden] = -torch.inf
    return logits


def candidates(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(logits, tokens) [k] that top-k and top-p leave of a row [v]; at least one.

    Equal logits at the k-th place all stay. The nucleus is of the distribution that top-k leaves: those before which
    less than or just `top_p` of its mass lies.
    """
    tokens = torch.arange(len(logits))
    if 0 < top_k < len(logits):
        threshold = logits.topk(top_k).values[-1]
        tokens = (logits >= threshold).nonzero()[:, 0]
        logits = logits[tokens]
    if top_p in (0.0, 1.0):
        return logits, tokens
    total = logits.double().logsumexp(0)
    for most in (FEW, len(logits)):
        values, order = logits.topk(min(most, len(logits)))
        mass = (values.double() - total).exp()
        before = mass.cumsum(0) - mass
        inside = before <= top_p
        if not inside[-1]:
            break
    return values[inside], tokens[order[inside]]
