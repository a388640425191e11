"""The matrices of BERT and T5: axes as in `axes.py`, of models whose program has another family.

Values that GPT's matrix has too are taken from there. What an encoder refuses (context parallelism, fully sharded
weights, documents) is not among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

from megatron.training.verify.compare import Deviation, compare
from tests.functional_tests.equivalence import axes, layouts
from tests.functional_tests.equivalence.axes import GLOBAL_BATCH, LAYOUT_AXES, NUMERIC_AXES, OTHER_AXES, Flags
from tests.functional_tests.equivalence.covering import Combination, Design, Row, Rule
from tests.functional_tests.equivalence.encoder_mutations import BERT_MUTATIONS, FAST_MISTAKES, T5_MUTATIONS
from tests.functional_tests.equivalence.mutations import Mutation

WORDS = Path(__file__).with_name("words.txt")
NOT_FOR_ENCODERS = ("--mock-data", "--tokenizer-type", "NullTokenizer")
BASE = [word for word in axes.BASE if word not in NOT_FOR_ENCODERS]
BASE += f"--data-path made-up --vocab-file {WORDS} --global-batch-size {GLOBAL_BATCH}".split()


def _some(axis: dict[str, Flags], *values: str) -> dict[str, Flags]:
    return {value: axis[value] for value in values}


COMMON: dict[str, dict[str, Flags]] = {
    "tp": LAYOUT_AXES["tp"],
    "sp": LAYOUT_AXES["sp"],
    "dp": LAYOUT_AXES["dp"],
    "sharding": _some(LAYOUT_AXES["sharding"], "none", "optimizer"),
    "overlap": OTHER_AXES["overlap"],
    "recompute": _some(OTHER_AXES["recompute"], "none", "selective", "uniform", "block", "distributed"),
    "rank order": OTHER_AXES["rank order"],
    "average": OTHER_AXES["average"],
    "weight gradients": _some(OTHER_AXES["weight gradients"], "fused", "unfused"),
    "micro-batch": OTHER_AXES["micro-batch"],
}
"""Ways to divide the work and to compute it that BERT and T5 share; see `LAYOUT_AXES` and `OTHER_AXES`."""

COMMON_NUMERIC: dict[str, dict[str, Flags]] = {
    "block": {"plain": "", "llama": "--normalization RMSNorm --swiglu --disable-bias-linear"},
    "output": NUMERIC_AXES["output"],
    "attention": NUMERIC_AXES["attention"],
    "tokens": NUMERIC_AXES["tokens"],
    "vocabulary": {
        "whole": "--make-vocab-size-divisible-by 1",
        "padded": "--make-vocab-size-divisible-by 8",
        "mostly padding": "--make-vocab-size-divisible-by 64",
    },
    "optimizer": NUMERIC_AXES["optimizer"],
}
"""What changes the numbers of both."""

RULES = [
    Rule(("tp", "sp"), lambda tp, sp: tp != "1" or sp == "off"),
    Rule(
        ("tp", "sp", "recompute"), lambda tp, sp, recompute: recompute != "distributed" or (tp != "1" and sp == "off")
    ),
    Rule(
        ("sharding", "overlap"), lambda sharding, overlap: overlap != "gradients and weights" or sharding == "optimizer"
    ),
    Rule(("dp", "micro-batch"), lambda dp, mbs: int(dp) * int(mbs) <= GLOBAL_BATCH),
]

BERT_SCHEDULES = ("1f1b", "gpipe", "zb-h1", "interleaved 2", "zb-v")
STAGES = {"1": 1, "1+1": 2, "1+2": 3, "2+1": 3, "2+2": 4}


@dataclass(frozen=True)
class Family:
    """The matrix of one model family, with the functions that `layouts` has for GPT."""

    program: str
    base: tuple[str, ...]
    layout_axes: dict[str, dict[str, Flags]]
    numeric_axes: dict[str, dict[str, Flags]]
    rules: list[Rule]
    stages_axis: str
    stages: dict[str, int]
    layers: dict[str, int] = field(default_factory=dict)
    """By schedule: layers for each stage, where it is not one."""
    mutations: list[Mutation] = field(default_factory=list)
    fast: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of axes that the fast selection has."""

    @cached_property
    def all_axes(self) -> dict[str, dict[str, Flags]]:
        """All of them."""
        return self.layout_axes | self.numeric_axes

    def num_ranks(self, row: Row) -> int:
        """Processes of a layout."""
        return int(row["tp"]) * int(row["dp"]) * self.stages[row[self.stages_axis]]

    def design(self, max_ranks: int = axes.MAX_RANKS) -> Design:
        """The space of layouts."""
        names = ("tp", self.stages_axis, "dp")
        size = Rule(names, lambda tp, stages, dp: prod((int(tp), self.stages[stages], int(dp))) <= max_ranks)
        prices = {("tp", n): axes.PRICE_OF_A_RANK * int(n) for n in self.all_axes["tp"]}
        prices |= {("dp", n): axes.PRICE_OF_A_RANK * int(n) for n in self.all_axes["dp"]}
        prices |= {(self.stages_axis, n): axes.PRICE_OF_A_RANK * size for n, size in self.stages.items()}
        return Design({name: list(values) for name, values in self.all_axes.items()}, [size, *self.rules], prices)

    def pairs(self) -> list[Combination]:
        """Every two values of two axes that may stand together."""
        design = self.design()
        return list(design.combinations(design.axes, 2))

    def matrix(self) -> list[Row]:
        """Layouts with all pairs of values, the fast selection first."""
        return self.design().cover(self.pairs(), self.fast_selection())

    def fast_selection(self) -> list[Row]:
        """Layouts that run in every test session, of up to four ranks: one for each of the values in which this family
        differs from GPT, and for each planted mistake that is noticed there."""
        design = self.design(max_ranks=4)
        wanted = [frozenset(m.smallest_layout().items()) for m in self.mutations if m.name in FAST_MISTAKES]
        values = [frozenset([(axis, value)]) for axis, values in self.fast.items() for value in values]
        return design.cover([*wanted, *values])

    def not_plain(self, row: Row) -> Row:
        """What distinguishes a layout from one process without anything special."""
        return {name: value for name, value in row.items() if value != next(iter(self.all_axes[name]))}

    def name_of(self, row: Row) -> str:
        """E.g. `tp=2 pp=2`."""
        return " ".join(f"{name}={value}" for name, value in self.not_plain(row).items()) or "plain"

    def flags_of(self, row: Row, steps: int, *, layout: bool = True) -> list[str]:
        """The command line of a layout that trains `steps` iterations; of one process without `layout`."""
        words = [*self.base, "--train-iters", str(steps)]
        if self.layers:
            count = max(2, self.stages[row[self.stages_axis]] * self.layers.get(row["schedule"], 1))
            words += ["--num-layers", str(count)]
        for name, values in (self.all_axes if layout else self.numeric_axes).items():
            flags = values[row[name]]
            words += (flags(row) if callable(flags) else flags).split()
        return words

    def deviations(self, row: Row, steps: int, mutation: str | None = None) -> list[Deviation]:
        """How far a layout is from one process in float64, with a planted mistake or without one.

        The mean over micro-batches of means over tokens depends on which samples form a micro-batch, where samples
        count unlike many tokens; only there the reference has the layout's micro-batches.
        """
        uneven = row["tokens"] == "uneven"
        size = row["micro-batch"] if uneven else "1"
        words = [*self.flags_of(row, steps, layout=False), "--micro-batch-size", size]
        reference = layouts.reference_run(tuple(words), uneven, self.program)

        def measured(**options: Any) -> list[Deviation]:
            found = layouts.run(self.num_ranks(row), self.flags_of(row, steps), uneven, program=self.program, **options)
            return compare(found, reference)

        if mutation is not None:
            return measured(mutation=mutation)
        return layouts.but_for_rounding(measured(), lambda: measured(in_float64=True))


BERT = Family(
    "pretrain_bert",
    (*BASE,),
    {
        "pp": LAYOUT_AXES["pp"],
        "schedule": _some(LAYOUT_AXES["schedule"], *BERT_SCHEDULES),
        **COMMON,
    },
    {
        "positions": {"learned": "", "rope": "--position-embedding-type rope"},
        "norms": {"before": "", "after the residual": "--apply-residual-connection-post-layernorm"},
        "binary head": {"yes": "", "no": "--bert-no-binary-head"},
        **COMMON_NUMERIC,
    },
    [
        *RULES,
        Rule(("pp", "schedule"), lambda pp, schedule: schedule == "1f1b" or pp != "1"),
        Rule(("pp", "rank order"), lambda pp, order: order == "tp-dp-pp" or pp != "1"),
        Rule(
            ("schedule", "pp", "dp", "micro-batch"),
            lambda schedule, pp, dp, mbs: (
                "interleaved" not in schedule or GLOBAL_BATCH // (int(dp) * int(mbs)) % int(pp) == 0
            ),
        ),
    ],
    "pp",
    {n: int(n) for n in ("1", "2", "4")},
    layers={"interleaved 2": 2, "zb-v": 2},
    mutations=BERT_MUTATIONS,
    fast={
        "schedule": ("interleaved 2", "zb-h1"),
        "sharding": ("optimizer",),
        "recompute": ("uniform",),
        "positions": ("rope",),
        "norms": ("after the residual",),
        "binary head": ("no",),
        "output": ("untied",),
        "tokens": ("uneven",),
    },
)

T5 = Family(
    "pretrain_t5",
    (
        *BASE,
        *"--kv-channels 12 --ffn-hidden-size 96 --encoder-num-layers 4 --decoder-num-layers 2".split(),
        *"--vocab-extra-ids 3 --encoder-seq-length 32 --decoder-seq-length 16".split(),
        *"--relative-attention-num-buckets 16 --relative-attention-max-distance 20".split(),
    ),
    {
        "stages": {
            "1": "",
            "1+1": "--encoder-pipeline-model-parallel-size 1",
            "1+2": "--encoder-pipeline-model-parallel-size 1 --pipeline-model-parallel-size 2",
            "2+1": "--pipeline-model-parallel-size 3 --pipeline-model-parallel-split-rank 2",
            "2+2": "--encoder-pipeline-model-parallel-size 2 --pipeline-model-parallel-size 2",
        },
        "schedule": _some(LAYOUT_AXES["schedule"], "1f1b", "gpipe", "zb-h1"),
        **COMMON,
    },
    {
        "positions": {
            "learned": "",
            "rope": "--position-embedding-type rope",
            "relative": "--position-embedding-type relative",
        },
        **COMMON_NUMERIC,
    },
    [
        *RULES,
        Rule(("stages", "schedule"), lambda stages, schedule: schedule == "1f1b" or stages != "1"),
        Rule(("stages", "rank order"), lambda stages, order: order == "tp-dp-pp" or stages != "1"),
    ],
    "stages",
    STAGES,
    mutations=T5_MUTATIONS,
    fast={
        "stages": ("1+2", "2+1"),
        "schedule": ("zb-h1",),
        "sp": ("on",),
        "sharding": ("optimizer",),
        "recompute": ("uniform",),
        "positions": ("rope", "relative"),
        "output": ("untied",),
        "tokens": ("uneven",),
    },
)

FAMILIES = {"bert": BERT, "t5": T5}


@cache
def fast_rows() -> list[tuple[str, Row]]:
    """(family, layout) of the fast selections."""
    return [(name, row) for name, family in FAMILIES.items() for row in family.fast_selection()]
