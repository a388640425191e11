"""The matrix of Mamba models and hybrids: state space layers, alone or among attention, feed-forward blocks, experts.

Samples have two chunks of the state space, of which context parallel ranks have parts. Balancing losses are those of
sequences, which depend on no micro-batch.
"""

from __future__ import annotations

from math import prod

from tests.functional_tests.equivalence import axes
from tests.functional_tests.equivalence.axes import GLOBAL_BATCH, LAYOUT_AXES, NUMERIC_AXES, OTHER_AXES, Flags
from tests.functional_tests.equivalence.covering import Design, Row, Rule
from tests.functional_tests.equivalence.encoders import COMMON_NUMERIC, Family

LAYERS = 8
"""Of all rows: patterns have as many letters, and pipelines up to eight stages."""
BASE = list(axes.BASE)
BASE += f"""--seq-length 128 --max-position-embeddings 128 --global-batch-size {GLOBAL_BATCH} --num-layers {LAYERS}
    --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec --is-hybrid-model --vocab-size 60
    --normalization RMSNorm --swiglu --disable-bias-linear --mamba-head-dim 8 --mamba-state-dim 8""".split()
EXPERTS = """--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-z-loss-coeff 0.01
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.05"""


def _some(axis: dict[str, Flags], *values: str) -> dict[str, Flags]:
    return {value: axis[value] for value in values}


LAYOUTS: dict[str, dict[str, Flags]] = {
    "pp": LAYOUT_AXES["pp"],
    "schedule": _some(LAYOUT_AXES["schedule"], "1f1b", "zb-h1", "interleaved 2", "zb-v"),
    "tp": LAYOUT_AXES["tp"],
    "sp": LAYOUT_AXES["sp"],
    "cp": LAYOUT_AXES["cp"],
    "cp type": _some(LAYOUT_AXES["cp type"], "p2p", "a2a"),
    "dp": LAYOUT_AXES["dp"],
    "ep": {n: f"--expert-model-parallel-size {n}" for n in ("1", "2", "4")},
    "dispatcher": {name: f"--moe-token-dispatcher-type {name}" for name in ("allgather", "alltoall")},
    "sharding": LAYOUT_AXES["sharding"],
    "overlap": OTHER_AXES["overlap"],
    "recompute": _some(OTHER_AXES["recompute"], "none", "modules", "uniform", "block"),
    "state space": {"recomputed": "", "stored": "--disable-mamba-mem-eff-path"},
    "micro-batch": OTHER_AXES["micro-batch"],
}
NUMBERS: dict[str, dict[str, Flags]] = {
    "layers": {
        "hybrid": "--hybrid-override-pattern M*-MM*-M",
        "by ratios": "--hybrid-attention-ratio 0.25 --hybrid-mlp-ratio 0.25",
        "state spaces": "",
        "experts": f"--hybrid-override-pattern ME*EMME* {EXPERTS}",
    },
    "groups": {n: f"--mamba-num-groups {n}" for n in ("8", "4", "2", "1")},
    "heads": {"8": "", "16": "--mamba-num-heads 16"},
    "positions": {"none": "--position-embedding-type none", "rope": "--position-embedding-type rope"},
    "output": COMMON_NUMERIC["output"],
    "tokens": COMMON_NUMERIC["tokens"],
    "loss": NUMERIC_AXES["loss"],
    "vocabulary": COMMON_NUMERIC["vocabulary"],
    "optimizer": COMMON_NUMERIC["optimizer"],
}
RULES = [
    Rule(("pp", "schedule"), lambda pp, schedule: schedule == "1f1b" or pp != "1"),
    Rule(
        ("schedule", "pp", "dp", "micro-batch"),
        lambda schedule, pp, dp, mbs: (
            "interleaved" not in schedule or GLOBAL_BATCH // (int(dp) * int(mbs)) % int(pp) == 0
        ),
    ),
    Rule(("tp", "sp"), lambda tp, sp: tp != "1" or sp == "off"),
    Rule(("tp", "sp", "layers"), lambda tp, sp, layers: layers != "experts" or tp == "1" or sp == "on"),
    Rule(("tp", "groups"), lambda tp, groups: int(groups) % int(tp) == 0),
    Rule(("cp", "cp type"), lambda cp, kind: kind == "p2p" or cp != "1"),
    Rule(("layers", "cp type"), lambda layers, kind: kind == "p2p" or layers != "state spaces"),
    Rule(("ep", "layers"), lambda ep, layers: ep == "1" or layers == "experts"),
    Rule(("dispatcher", "layers"), lambda way, layers: way == "allgather" or layers == "experts"),
    Rule(("cp", "dp", "ep"), lambda cp, dp, ep: int(cp) * int(dp) % int(ep) == 0),
    Rule(("dp", "micro-batch"), lambda dp, mbs: int(dp) * int(mbs) <= GLOBAL_BATCH),
    Rule(("layers", "positions"), lambda layers, positions: positions == "none" or layers != "state spaces"),
    *(
        Rule(("sharding", axis), lambda sharding, value, only=value: sharding != "weights" or value == only)
        for axis, value in {"pp": "1", "output": "untied", "overlap": "none"}.items()
    ),
    Rule(("sharding", "layers"), lambda sharding, layers: sharding != "weights" or layers != "experts"),
    Rule(("sharding", "dp", "cp"), lambda sharding, dp, cp: sharding != "weights" or int(dp) * int(cp) > 1),
    Rule(
        ("sharding", "overlap"), lambda sharding, overlap: overlap != "gradients and weights" or sharding == "optimizer"
    ),
]


TIED = {"tp": "4", "cp": "2", "ep": "2", "layers": "experts"}
"""With the usual seed, scores of two experts differ by 9e-8 there for a token of the second step, in float64: rounding
may send it to either."""


class _Hybrids(Family):
    """Context parallel ranks too, which encoders do not have."""

    def flags_of(self, row: Row, steps: int, *, layout: bool = True) -> list[str]:
        """The command line of a layout, or of its reference; see `TIED` for the seed."""
        words = super().flags_of(row, steps, layout=layout)
        return [*words, "--seed", "5"] if TIED.items() <= row.items() else words

    def num_ranks(self, row: Row) -> int:
        """Processes of a layout."""
        return super().num_ranks(row) * int(row["cp"])

    def design(self, max_ranks: int = axes.MAX_RANKS) -> Design:
        """The space of layouts."""
        names = ("tp", "cp", "pp", "dp")
        size = Rule(names, lambda *sizes: prod(map(int, sizes)) <= max_ranks)
        prices = {(axis, n): axes.PRICE_OF_A_RANK * int(n) for axis in names for n in self.all_axes[axis]}
        return Design({name: list(values) for name, values in self.all_axes.items()}, [size, *self.rules], prices)


HYBRIDS = _Hybrids("pretrain_mamba", (*BASE,), LAYOUTS, NUMBERS, RULES, "pp", {n: int(n) for n in ("1", "2", "4")})
