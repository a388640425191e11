"""What layouts are made of. An axis is one entry here; a value that needs what is not built yet is left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle, islice
from math import prod

from megatron.training.arguments import build_parser, parse_args, validate_args
from megatron.training.library_configs import (
    core_transformer_config_from_args,
    ddp_config_from_args,
    optimizer_config_from_args,
)
from megatron.training.settings import ConfigurationError
from tests.functional_tests.equivalence.covering import Combination, Design, Row, Rule

Flags = str | Callable[[Row], str]

BASE = """
    --hidden-size 32 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 --init-method-std 0.1
    --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --weight-decay 0.1 --adam-eps 1e-2 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --num-workers 0
    --eval-iters 1 --eval-interval 1000 --log-interval 1000 --no-progress-bar
""".split()
"""A small GPT whose gradients are all of a size, and an Adam whose eps is of that size: see `Bounds`."""

PRICE_OF_A_RANK = 0.5
PRICE_OF_COMPILING = 8.0
"""New combinations that one more rank along an axis must bring, and those that compiling must."""
MAX_RANKS = 8
GLOBAL_BATCH = 8

LAYOUT_AXES: dict[str, dict[str, Flags]] = {
    "tp": {n: f"--tensor-model-parallel-size {n}" for n in ("1", "2", "4")},
    "sp": {"off": "", "on": "--sequence-parallel"},
    "pp": {n: f"--pipeline-model-parallel-size {n}" for n in ("1", "2", "4")},
    "schedule": {
        "1f1b": "",
        "gpipe": "--pipeline-schedule gpipe",
        "zb-h1": "--pipeline-schedule zb-h1",
        "interleaved 2": "--num-virtual-stages-per-pipeline-rank 2",
        "interleaved 4": "--num-virtual-stages-per-pipeline-rank 4",
        "zb-v": "--pipeline-schedule zb-v --num-virtual-stages-per-pipeline-rank 2",
    },
    "cp": {n: f"--context-parallel-size {n}" for n in ("1", "2", "4")},
    "cp type": {
        "p2p": "",
        "all_gather": "--cp-comm-type all_gather",
        "a2a": "--cp-comm-type a2a",
        "a2a+p2p": "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
        "by layer": lambda row: (
            f"--cp-comm-type {' '.join(islice(cycle(('a2a', 'p2p', 'all_gather')), num_layers(row)))}"
        ),
    },
    "dp": dict.fromkeys(("1", "2", "4"), ""),
    "sharding": {
        "none": "",
        "optimizer": "--use-distributed-optimizer",
        "weights": "--use-torch-fsdp2 --no-gradient-accumulation-fusion --untie-embeddings-and-output-weights",
    },
}
"""How work is divided over ranks, and in which order they do it."""

OTHER_AXES: dict[str, dict[str, Flags]] = {
    "placement": {
        "even": "",
        "uneven": "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 2",
        "accounted": "--account-for-loss-in-pipeline-split",
        "layout": lambda row: f"--pipeline-model-parallel-layout E{'|t' * (int(row['pp']) - 1)}tL",
    },
    "transfers": {
        "overlapped": "",
        "waited for": "--no-overlap-p2p-communication",
        "overlapped throughout": "--overlap-p2p-communication-warmup-flush",
    },
    "rank order": {"tp-dp-pp": "", "tp-pp-dp": "--use-tp-pp-dp-mapping"},
    "overlap": {
        "none": "",
        "gradients": "--overlap-grad-reduce --ddp-bucket-size 4000",
        "gradients and weights": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4000 "
        "--use-distributed-optimizer",
    },
    "optimizer instances": {
        "1": "",
        "2": "--num-distributed-optimizer-instances 2 --use-distributed-optimizer",
    },
    "recompute": {
        "none": "",
        "selective": "--recompute-activations",
        "modules": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
        "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "distributed": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--distribute-saved-activations",
    },
    "offload": {"none": "", "first layer": "--cpu-offloading --cpu-offloading-num-layers 1"},
    "tp overlap": {"off": "", "on": "--tp-comm-overlap"},
    "average": {"scaled": "", "collective": "--ddp-average-in-collective"},
    "weight gradients": {
        "fused": "",
        "unfused": "--no-gradient-accumulation-fusion",
        "those of the vocabulary later": "--defer-embedding-wgrad-compute",
    },
    "sharded layers": {
        "freed after forward": "",
        "kept for backward": "--torch-fsdp2-no-reshard-after-forward",
        "built on the meta device": "--init-model-with-meta-device",
    },
    "compile": {"off": "", "on": "--torch-compile"},
    "micro-batch": {n: f"--micro-batch-size {n}" for n in ("1", "2")},
}
"""How else the same numbers can be computed."""

NUMERIC_AXES: dict[str, dict[str, Flags]] = {
    "block": {
        "gpt": "",
        "llama": "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --qk-layernorm",
    },
    "output": {"tied": "", "untied": "--untie-embeddings-and-output-weights"},
    "query groups": {
        "all": "",
        "4": "--group-query-attention --num-query-groups 4",
        "2": "--group-query-attention --num-query-groups 2",
    },
    "attention": {"sdpa": "", "unfused": "--attention-backend unfused"},
    "documents": {"off": "", "isolated": "--reset-position-ids --reset-attention-mask --eod-mask-loss"},
    "tokens": {"even": "", "uneven": ""},
    "loss": {"per micro-batch": "", "per token": "--calculate-per-token-loss"},
    "vocabulary": {
        "whole": "--vocab-size 63 --make-vocab-size-divisible-by 1",
        "padded": "--vocab-size 60 --make-vocab-size-divisible-by 8",
        "mostly padding": "--vocab-size 60 --make-vocab-size-divisible-by 64",
    },
    "batch size": {
        "constant": f"--global-batch-size {GLOBAL_BATCH}",
        "growing": f"--global-batch-size {GLOBAL_BATCH} --rampup-batch-size 4 4 4",  # 4, 8, 8, ...
    },
    "optimizer": {"adam": "", "sgd": "--optimizer sgd --sgd-momentum 0.9"},
}
"""What changes the numbers, for one process as for many: a reference is made for each combination."""

RARE: dict[str, list[str]] = {
    "cp type": ["by layer"],
    "placement": ["accounted", "layout"],
    "transfers": ["waited for", "overlapped throughout"],
    "recompute": ["modules", "block", "distributed"],
    "weight gradients": ["those of the vocabulary later"],
    "sharded layers": ["kept for backward", "built on the meta device"],
}
"""Values that the fast selection contains once each, not in pairs: they are variants of one that it has in pairs."""

AXES_BY_THREE = [*LAYOUT_AXES, "overlap"]
"""The axes of which every three values that may stand together do so in some layout."""
ALL_AXES: dict[str, dict[str, Flags]] = {**LAYOUT_AXES, **OTHER_AXES, **NUMERIC_AXES}


def num_chunks(row: Row) -> int:
    """Virtual stages of each pipeline rank."""
    return {"interleaved 2": 2, "interleaved 4": 4, "zb-v": 2}.get(row["schedule"], 1)


def num_layers(row: Row) -> int:
    """Layers of the model: as many as its stages ask for, not fewer than two."""
    stages = int(row["pp"]) * num_chunks(row)
    return {"even": max(2, stages), "uneven": stages + 1, "accounted": 2 * stages - 1, "layout": stages}[
        row["placement"]
    ]


def num_ranks(row: Row) -> int:
    """Processes of a layout."""
    return prod(int(row[axis]) for axis in ("tp", "cp", "pp", "dp"))


RULES = [
    Rule(("pp", "offload"), lambda pp, offload: offload == "none" or pp == "1"),
    Rule(("recompute", "offload"), lambda recompute, offload: offload == "none" or recompute == "none"),
    Rule(
        ("tp", "sp", "recompute"), lambda tp, sp, recompute: recompute != "distributed" or (tp != "1" and sp == "off")
    ),
    Rule(("schedule", "transfers"), lambda schedule, way: way == "overlapped" or schedule not in ("1f1b", "gpipe")),
    Rule(("pp", "weight gradients"), lambda pp, when: when != "those of the vocabulary later" or pp != "1"),
    Rule(("sharding", "sharded layers"), lambda sharding, how: how == "freed after forward" or sharding == "weights"),
    Rule(("sp", "tp overlap"), lambda sp, overlap: overlap == "off" or sp == "on"),
    Rule(
        ("pp", "schedule"),
        lambda pp, schedule: schedule == "1f1b" or (pp != "1" and (pp, schedule) != ("4", "interleaved 4")),
    ),
    Rule(
        ("schedule", "placement"),
        lambda schedule, placement: placement == "even" or num_chunks({"schedule": schedule}) == 1,
    ),
    Rule(
        ("schedule", "pp", "dp", "micro-batch", "batch size"),
        lambda schedule, pp, dp, mbs, size: (
            "interleaved" not in schedule
            or (4 if size == "growing" else GLOBAL_BATCH) // (int(dp) * int(mbs)) % int(pp) == 0
        ),
    ),
    Rule(("cp", "cp type"), lambda cp, kind: kind == "p2p" or cp == "4" or (cp == "2" and kind != "a2a+p2p")),
    Rule(
        ("sharding", "overlap"), lambda sharding, overlap: overlap != "gradients and weights" or sharding == "optimizer"
    ),
    *(
        Rule(("sharding", axis), lambda sharding, value, only=value: sharding != "weights" or value == only)
        for axis, value in {"pp": "1", "output": "untied", "weight gradients": "unfused", "overlap": "none"}.items()
    ),
    Rule(("sharding", "optimizer instances"), lambda sharding, n: n == "1" or sharding == "optimizer"),
    Rule(("dp", "cp", "optimizer instances"), lambda dp, cp, n: int(dp) * int(cp) >= int(n)),
    Rule(("pp", "cp", "rank order"), lambda pp, cp, order: order == "tp-dp-pp" or (pp != "1" and cp == "1")),
    Rule(("tp", "sp"), lambda tp, sp: tp != "1" or sp == "off"),
    Rule(("pp", "placement"), lambda pp, placement: placement == "even" or pp != "1"),
    Rule(("tp", "query groups"), lambda tp, groups: groups == "all" or int(groups) >= int(tp)),
    Rule(
        ("batch size", "dp", "micro-batch"),
        lambda size, dp, mbs: int(dp) * int(mbs) <= (4 if size == "growing" else GLOBAL_BATCH),
    ),
    Rule(("average", "loss"), lambda average, loss: not (average == "collective" and loss == "per token")),
]


def flags_of(row: Row, steps: int, *, axes: dict[str, dict[str, Flags]] | None = None) -> list[str]:
    """The command line of a layout that trains `steps` iterations."""
    words = list(BASE) + ["--num-layers", str(num_layers(row))]
    if row["batch size"] == "growing":
        words += ["--train-samples", str(4 + GLOBAL_BATCH * (steps - 1))]
    else:
        words += ["--train-iters", str(steps)]
    for name, values in (axes or ALL_AXES).items():
        flags = values[row[name]]
        words += (flags(row) if callable(flags) else flags).split()
    return words


def reference_of(row: Row, steps: int) -> tuple[list[str], bool]:
    """(the command line of one process that computes the same, whether its samples are uneven).

    The mean over micro-batches of means over tokens depends on which samples form a micro-batch, where samples count
    unlike many tokens; only there the reference has the layout's micro-batches. Everywhere else it takes one sample at
    a time, whatever the layout does.
    """
    uneven = row["tokens"] == "uneven" or row["documents"] != "off"
    size = row["micro-batch"] if uneven and row["loss"] == "per micro-batch" else "1"
    return [*flags_of(row, steps, axes=NUMERIC_AXES), "--micro-batch-size", size], row["tokens"] == "uneven"


@cache
def _known_flags() -> frozenset[str]:
    return frozenset(build_parser()._option_string_actions)


@cache
def is_built(flags: str, ranks: int = 8) -> bool:
    """Whether no flag of these waits for a capability that does not exist yet."""
    words = [*BASE, "--num-layers", "8", "--vocab-size", "60", "--global-batch-size", "8", "--micro-batch-size", "1"]
    if any(word.startswith("--") and word not in _known_flags() for word in flags.split()):
        return False
    args = parse_args(argv=[*words, "--train-iters", "1", *flags.split()])
    args.world_size = ranks
    try:
        validate_args(args)
        for make in (core_transformer_config_from_args, ddp_config_from_args, optimizer_config_from_args):
            make(args)
    except (ConfigurationError, NotImplementedError) as error:
        return "not built yet" not in str(error)
    except (ValueError, AttributeError):
        return True
    return True


def plain_row(**values: str) -> Row:
    """One process without anything special, but for the axes given (`_` for a blank in their names)."""
    row = {name: next(iter(choices)) for name, choices in ALL_AXES.items()}
    changed = {name.replace("_", " "): value for name, value in values.items()}
    if unknown := [f"{n}={v}" for n, v in changed.items() if v not in ALL_AXES.get(n, ())]:
        raise ValueError(f"no such values of axes: {unknown}")
    return row | changed


def fast_combinations(small: Design) -> list[Combination]:
    """What the fast selection covers: pairs of values, and those of `RARE` once."""
    is_rare = lambda axis, value: value in RARE.get(axis, ())  # noqa: E731
    once = [frozenset([(axis, value)]) for axis in RARE for value in RARE[axis]]
    pairs = small.combinations(small.axes, 2)
    return [*(pair for pair in pairs if not any(is_rare(*item) for item in pair)), *once]


def design(*, fast: bool = False, max_ranks: int = MAX_RANKS) -> Design:
    """All axes with the values that are built; `fast` leaves out those that take long: compiling, many layers."""
    built = {
        name: [value for value, flags in values.items() if callable(flags) or is_built(flags)]
        for name, values in ALL_AXES.items()
    }
    if fast:
        built["compile"] = ["off"]
        built["schedule"] = [value for value in built["schedule"] if value != "interleaved 4"]
    prices = {("compile", "on"): PRICE_OF_COMPILING} | {
        (axis, n): PRICE_OF_A_RANK * int(n) for axis in ("tp", "cp", "pp", "dp") for n in built[axis]
    }
    size_rule = Rule(("tp", "pp", "dp", "cp"), lambda *sizes: prod(map(int, sizes)) <= max_ranks)
    return Design(built, [size_rule, *RULES], prices)
