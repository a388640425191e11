"""Widths of a Mamba-2 mixer, whole and on one rank: arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.config_rules import require


@dataclass(frozen=True)
class MambaSizes:
    """One mixer's. `names` of the fields in messages are those of `TransformerConfig`.

    Raises:
        ValueError: a width is not positive, or groups do not share the heads equally.
    """

    inner: int
    """Channels of x and z: heads x head_dim."""
    heads: int
    head_dim: int
    groups: int
    """Sets of heads that share B and C."""
    state: int

    @classmethod
    def of(
        cls,
        hidden_size: int,
        *,
        mamba_head_dim: int,
        mamba_num_groups: int,
        mamba_state_dim: int,
        mamba_num_heads: int | None = None,
        expand: int = 2,
    ) -> MambaSizes:
        """Without a number of heads, there are so many that they are `expand` times as wide as the residual stream."""
        given = {"mamba_head_dim": mamba_head_dim, "mamba_num_groups": mamba_num_groups}
        for name, value in {**given, "mamba_state_dim": mamba_state_dim}.items():
            require(value > 0, f"{name} ({value}) must be positive")
        if mamba_num_heads is None:
            inner = expand * hidden_size
            require(
                inner % mamba_head_dim == 0,
                f"a mixer is {expand} times as wide as hidden_size ({hidden_size}): {inner} must be divisible by "
                f"mamba_head_dim ({mamba_head_dim}); {_divisors_of(inner, mamba_head_dim)} would do, "
                "or give mamba_num_heads",
            )
            mamba_num_heads = inner // mamba_head_dim
        require(mamba_num_heads > 0, f"mamba_num_heads ({mamba_num_heads}) must be positive")
        require(
            mamba_num_heads % mamba_num_groups == 0,
            f"the {mamba_num_heads} heads of a mixer (mamba_num_heads) must be divisible by mamba_num_groups "
            f"({mamba_num_groups}); {_divisors_of(mamba_num_heads, mamba_num_groups)} would do",
        )
        inner = mamba_num_heads * mamba_head_dim
        return cls(inner, mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim)

    @property
    def parts_of_projection(self) -> tuple[int, ...]:
        """Rows of in_proj, in order: z, x, B, C, dt."""
        return (self.inner, *self.parts_of_conv, self.heads)

    @property
    def parts_of_conv(self) -> tuple[int, ...]:
        """Channels of the convolution, in order: x, B, C."""
        return (self.inner, self.groups * self.state, self.groups * self.state)

    def over_tensor_ranks(self, ranks: int) -> MambaSizes:
        """What each of `ranks` tensor parallel ranks holds.

        Raises:
            ValueError: heads or groups do not divide over them.
        """
        for name, count in (("mamba_num_heads", self.heads), ("mamba_num_groups", self.groups)):
            require(
                count % ranks == 0,
                f"the {count} {'heads' if 'heads' in name else 'groups'} of a mixer ({name}) must be divisible by "
                f"tensor_model_parallel_size ({ranks}); with {name} {count} {_sizes_of(count)} would do",
            )
        inner, heads, groups = self.inner // ranks, self.heads // ranks, self.groups // ranks
        return MambaSizes(inner, heads, self.head_dim, groups, self.state)

    def require_context_ranks(self, ranks: int) -> None:
        """Refuse context parallel ranks that cannot share the heads of a tensor parallel rank (these sizes).

        Raises:
            ValueError: heads do not divide, or a rank would have parts of several groups.
        """
        fits = [size for size in _divisors(self.heads) if _share(self.heads, self.groups, size)]
        require(
            ranks in fits,
            f"the {self.heads} heads in {self.groups} groups that a tensor parallel rank has of a mixer are shared "
            f"among context_parallel_size ({ranks}) ranks: heads must be divisible by it, and groups divide by it or "
            f"it by them; {_listed(fits)} would do",
        )


def _share(heads: int, groups: int, ranks: int) -> bool:
    return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _divisors_of(number: int, near: int) -> str:
    """The divisors next to `near`."""
    return _listed(sorted(sorted(_divisors(number), key=lambda n: (abs(n - near), n))[:3]))


def _sizes_of(number: int) -> str:
    return _listed(_divisors(number)[:6])
