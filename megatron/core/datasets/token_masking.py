"""Which tokens of a masked language model's sample are hidden: whole words, in runs of several (n-grams).

Devlin et al., arXiv:1810.04805 (masking), Joshi et al., arXiv:1907.10529 (spans with geometric lengths), Raffel et al.,
arXiv:1910.10683 (sentinels for spans). The order of the random draws is part of the data format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy

_GEOMETRIC_P = 0.2


@dataclass(frozen=True)
class NgramMasking:
    """How tokens are chosen."""

    probability: float
    """Share of the tokens that is hidden."""

    max_ngram: int
    """Most words of a run."""

    geometric: bool = False
    """Draw the words of a run from a geometric distribution (p = 0.2) instead of proportionally to 1 / words."""

    longer_ngrams: bool = False
    """Favour long runs: the probabilities 1 / words in reverse order."""

    permutation: bool = False
    """Also permute a second choice of tokens among themselves."""


@dataclass
class Masked:
    """A sample with hidden tokens."""

    tokens: list[int]
    """With the replacements."""

    positions: list[int] = field(default_factory=list)
    """Of hidden (and permuted) tokens, ascending."""

    labels: list[int] = field(default_factory=list)
    """The original token at each position."""

    spans: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """(positions, original tokens) of each hidden run, in order of their first positions."""


def word_groups(tokens: Sequence[int], is_special: Callable[[int], bool], continues: Sequence[bool]) -> list[list[int]]:
    """The positions of each word. Special tokens belong to no word; tokens that continue a word join the one before."""
    groups: list[list[int]] = []
    for position, token in enumerate(tokens):
        if is_special(token):
            continue
        if groups and continues[token]:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def mask_tokens(
    tokens: Sequence[int],
    words: list[list[int]],
    target_length: int,
    masking: NgramMasking,
    replacement: Callable[[int, numpy.random.RandomState], int],
    rng: numpy.random.RandomState,
) -> Masked:
    """Hide about `masking.probability` of the tokens.

    Args:
        words: positions of each word, from `word_groups`.
        target_length: length that the sample was meant to have, which bounds how many tokens are hidden.
        replacement: what stands in the place of a hidden token; draws from the generator it is given.
    """
    budget = min(masking.probability * target_length, max(1, round(len(tokens) * masking.probability)))
    chooser = _RunChooser(words, masking, budget, rng)
    masked, originals = Masked(list(tokens)), {}
    for run in chooser.runs():
        for position in run:
            originals[position] = tokens[position]
            masked.tokens[position] = replacement(tokens[position], rng)
        masked.spans.append((run, [tokens[position] for position in run]))
    chooser.shuffle()
    if masking.permutation:
        chosen = sorted(position for run in chooser.runs() for position in run)
        before = list(masked.tokens)
        for position, source in zip(chosen, rng.permutation(chosen).tolist()):
            originals[position] = tokens[position]
            masked.tokens[position] = before[source]
    masked.positions = sorted(originals)
    masked.labels = [originals[position] for position in masked.positions]
    masked.spans.sort(key=lambda span: span[0][0])
    return masked


class _RunChooser:
    """Runs of words in random order, none of them overlapping, until a budget of tokens is spent."""

    def __init__(
        self, words: list[list[int]], masking: NgramMasking, budget: float, rng: numpy.random.RandomState
    ) -> None:
        self._words, self._masking, self._budget, self._rng = words, masking, budget, rng
        self._sizes = numpy.arange(1, masking.max_ngram + 1)
        odds = 1.0 / self._sizes
        odds /= odds.sum()
        self._odds = odds[::-1] if masking.longer_ngrams else odds
        self._order = list(range(len(words)))
        self._taken: set[int] = set()
        self.shuffle()

    def shuffle(self) -> None:
        """Put the starting words in another random order."""
        self._rng.shuffle(self._order)

    def runs(self) -> Iterable[list[int]]:
        """The positions of each chosen run; each call has the whole budget, but never takes a position twice."""
        count = 0
        for start in self._order:
            if count >= self._budget:
                return
            run = self._longest_that_fits(start, self._draw_size(), self._budget - count)
            if run and self._taken.isdisjoint(run):
                self._taken.update(run)
                count += len(run)
                yield run

    def _draw_size(self) -> int:
        if self._masking.geometric:
            return min(int(self._rng.geometric(_GEOMETRIC_P)), self._masking.max_ngram)
        return int(self._rng.choice(self._sizes, p=self._odds))

    def _longest_that_fits(self, start: int, size: int, room: float) -> list[int]:
        """The run of at most `size` words from word `start` on with no more than `room` tokens; empty if none."""
        while size:
            run = [position for word in self._words[start : start + size] for position in word]
            if len(run) <= room:
                return run
            size -= 1
        return []
