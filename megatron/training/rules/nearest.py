"""The layouts nearest to one that was refused which all rules allow; a suggestion that has been tried.

A layout is blamed for a refusal if another layout of the same settings passes. What passes is not computed a second
time: a candidate is a copy of the settings with other parallel sizes, handed to the very rules that refused.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.training.settings import Settings

MOST_TRIES = 200
"""Candidates that are tried before giving up: a tenth of a second or two."""

_PLACEMENT: dict[str, Any] = {
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
"""Flags that place layers on stages, and what they are when left out."""


@dataclass(frozen=True)
class Layout:
    """How a model is cut. What ranks are left over hold copies of it."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    chunks: int = 1
    """Model chunks of each stage; above 1 the pipeline is interleaved."""
    sequence_parallel: bool = False
    own_placement: bool = False
    """Whether flags that place layers on stages are kept; without them stages are equal."""

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


Allowed = Callable[[Layout], bool]


def nearest_layouts(wanted: Layout, world_size: int, allowed: Allowed, count: int = 3) -> list[Layout]:
    """At most `count` layouts of `world_size` ranks that are `allowed`, the one most like `wanted` first.

    They differ in tensor, pipeline or context parallel size, or, where the sizes of `wanted` can stay, in the rest.
    """
    found: list[Layout] = []
    for layout in itertools.islice(candidates(wanted, world_size), MOST_TRIES):
        known = any(_sizes(layout) == _sizes(other) for other in found)
        if not known and allowed(layout):
            found.append(layout)
        if len(found) == count:
            break
    return found


def candidates(wanted: Layout, world_size: int) -> Iterator[Layout]:
    """Layouts whose ranks divide `world_size`, from the nearest to the farthest; `wanted` itself is none."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    sizes = (
        size
        for size in itertools.product(divisors, repeat=3)
        if world_size % math.prod(size) == 0 and (size[2] == 1 or wanted.context > 1)
    )
    layouts = {
        Layout(tensor, pipeline, context, chunks if pipeline > 1 else 1, sequence and tensor > 1, placed)
        for tensor, pipeline, context in sizes
        for chunks in range(1, 2 * wanted.chunks if wanted.chunks > 1 else 2)
        for sequence in (True, False)
        for placed in ({wanted.own_placement, False} if pipeline == wanted.pipeline else {False})
    }
    return iter(
        sorted(layouts - {wanted}, key=lambda layout: (distance(wanted, layout), -layout.ranks, -layout.tensor))
    )


def distance(a: Layout, b: Layout) -> float:
    """How much changes from one layout to the other: doublings of each size, and of the memory of a rank."""

    def doublings(x: int, y: int) -> float:
        return abs(math.log2(x / y))

    sizes = sum(doublings(x, y) for x, y in zip(_sizes(a), _sizes(b)))
    sequence_matters = a.tensor > 1 and b.tensor > 1
    return (
        sizes
        + 0.5 * doublings(a.ranks, b.ranks)
        + 0.5 * doublings(a.chunks, b.chunks)
        + 0.3 * (a.own_placement != b.own_placement)
        + 0.25 * (sequence_matters and a.sequence_parallel != b.sequence_parallel)
    )


def _sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.tensor, layout.pipeline, layout.context


# --- layouts as settings --------------------------------------------------------------------------


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that settings ask for, before any rule has touched them; it need not be possible."""
    stages = max(1, args.pipeline_model_parallel_size)
    return Layout(
        tensor=max(1, args.tensor_model_parallel_size),
        pipeline=stages,
        context=max(1, args.context_parallel_size),
        chunks=_chunks(args, stages),
        sequence_parallel=bool(args.sequence_parallel),
        own_placement=any(getattr(args, name) != default for name, default in _PLACEMENT.items()),
    )


def _chunks(args: argparse.Namespace, stages: int) -> int:
    if args.num_virtual_stages_per_pipeline_rank:
        return max(1, int(args.num_virtual_stages_per_pipeline_rank))
    if isinstance(args.pipeline_model_parallel_layout, str):
        return max(1, len(args.pipeline_model_parallel_layout.split("|")) // stages)
    if args.num_layers_per_virtual_pipeline_stage and _layers(args):
        return max(1, round(_layers(args) / stages / args.num_layers_per_virtual_pipeline_stage))
    return 1


def _layers(args: argparse.Namespace) -> int:
    layers = args.num_layers or args.encoder_num_layers or 0
    counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    return int(layers + counted if layers else 0)


def changes_for(args: argparse.Namespace, layout: Layout) -> dict[str, Any]:
    """Settings that differ from `args` when they ask for `layout`, in the words that `args` uses for chunks."""
    wanted = layout_of(args)
    values: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
    }
    if layout.context != wanted.context:
        values["hierarchical_context_parallel_sizes"] = None
    if not layout.own_placement:
        values |= _PLACEMENT
    if layout.chunks != wanted.chunks or layout.pipeline != wanted.pipeline or not layout.own_placement:
        values |= _chunk_settings(args, layout)
    return {name: value for name, value in values.items() if value != getattr(args, name)}


def _chunk_settings(args: argparse.Namespace, layout: Layout) -> dict[str, Any]:
    by_layers, by_number = "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"
    values = dict.fromkeys((by_layers, by_number))
    parts = layout.pipeline * layout.chunks
    if layout.chunks > 1 and getattr(args, by_layers) and _layers(args) % parts == 0:
        return {**values, by_layers: _layers(args) // parts}
    return {**values, by_number: layout.chunks if layout.chunks > 1 else None}


def variant(args: argparse.Namespace, changes: dict[str, Any]) -> argparse.Namespace:
    """A copy of settings with some changed, which speaks to nobody."""
    changes = changes | {"rank": 1}  # only rank 0 is warned
    if isinstance(args, Settings):
        return args.variant(**changes)
    other = copy.copy(args)
    vars(other).update(changes)
    return other


# --- what to say ----------------------------------------------------------------------------------


def suggestions(args: argparse.Namespace, passes: Callable[[argparse.Namespace], bool]) -> str:
    """Lines about what would work instead of the refused `args`; empty if no other layout does.

    Args:
        args: the settings as they were before the first rule.
        passes: whether all rules allow some settings.
    """
    wanted, world = layout_of(args), args.world_size

    def allowed(layout: Layout) -> bool:
        return passes(variant(args, changes_for(args, layout)))

    lines = [f"  {in_flags(args, layout)}" for layout in nearest_layouts(wanted, world, allowed)]
    if lines:
        lines.insert(0, f"the nearest layouts of {_processes(world)} that would work:")
    numbers = [n for n in neighbours(world, wanted.ranks) if passes(variant(args, {"world_size": n}))]
    if numbers:
        lines.append(f"this layout would work with {_processes(*numbers)}")
    sizes = [n for n in _batches(args, wanted) if passes(variant(args, {"global_batch_size": n}))]
    if sizes:
        lines.append(f"this layout would work with --global-batch-size {' or '.join(map(str, sizes))}")
    return "\n".join(lines)


def neighbours(number: int, step: int) -> list[int]:
    """The positive multiples of `step` next to `number`, below and above it.

    >>> neighbours(6, 4)
    [4, 8]
    """
    below = number - number % step
    return [n for n in sorted({below, below + step}) if n > 0 and n != number]


def _batches(args: argparse.Namespace, wanted: Layout) -> Iterable[int]:
    if not args.global_batch_size or not args.micro_batch_size or args.world_size % wanted.ranks:
        return []
    samples = args.micro_batch_size * (args.world_size // wanted.ranks)
    steps = [samples, samples * wanted.pipeline] if wanted.chunks > 1 else [samples]
    return sorted({n for step in steps for n in neighbours(args.global_batch_size, step)})


def in_flags(args: argparse.Namespace, layout: Layout) -> str:
    """A layout as the flags that ask for it, with the data parallel size that follows."""
    wanted = layout_of(args)
    words = [f"--tensor-model-parallel-size {layout.tensor}"]
    for name in ("pipeline", "context"):
        if getattr(layout, name) > 1 or getattr(wanted, name) > 1:
            flag = "--pipeline-model-parallel-size" if name == "pipeline" else "--context-parallel-size"
            words.append(f"{flag} {getattr(layout, name)}")
    changes = changes_for(args, layout)
    words += [
        f"{_flag(name)} {changes[name]}"
        for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
        if changes.get(name)
    ]
    if layout.tensor > 1 and layout.sequence_parallel != wanted.sequence_parallel:
        words.append(("" if layout.sequence_parallel else "without ") + "--sequence-parallel")
    left_out = [
        _flag(name)
        for name, value in changes.items()
        if name != "sequence_parallel" and (value is None or value is False)
    ]
    if left_out:
        words.append(f"without {' and '.join(left_out)}")
    return f"{' '.join(words)} (data parallel size {args.world_size // layout.ranks})"


def _flag(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


def _processes(*counts: int) -> str:
    return f"{' or '.join(map(str, counts))} {'process' if counts == (1,) else 'processes'}"
