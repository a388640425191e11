"""The model of sparse layers in the matrix: experts, latent attention and further tokens, in every layout of theirs.

Its micro-batches have one sample, for balancing losses and capacities are those of a micro-batch.
"""

from __future__ import annotations

import contextlib
import io
from functools import cache, lru_cache
from math import prod
from typing import Any

from megatron.training.verify.compare import Deviation, compare
from megatron.training.verify.measure import Measurement, Program, Samples, measure
from tests.functional_tests.equivalence import axes, sparse_mutations
from tests.functional_tests.equivalence.covering import Combination, Design, Row, Rule
from tests.functional_tests.equivalence.layouts import but_for_rounding
from tests.functional_tests.equivalence.mutations import planted
from tests.worker_pool import run_ranks

STEPS = 3
BASE = [
    *axes.BASE,
    *"""--disable-bias-linear --swiglu --position-embedding-type rope --normalization RMSNorm --qk-layernorm
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-z-loss-coeff 0.01
    --vocab-size 60 --make-vocab-size-divisible-by 8 --global-batch-size 8 --micro-batch-size 1""".split(),
]
LATENT = "--multi-latent-attention --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6"

LAYOUT_AXES: dict[str, dict[str, str]] = {
    "tp": {"1": "", "2": "--tensor-model-parallel-size 2 --sequence-parallel"},
    "pp": {n: f"--pipeline-model-parallel-size {n}" for n in ("1", "2")},
    "schedule": {"1f1b": "", "zb-v": "--pipeline-schedule zb-v --num-virtual-stages-per-pipeline-rank 2"},
    "cp": {n: f"--context-parallel-size {n}" for n in ("1", "2")},
    "dp": dict.fromkeys(("1", "2", "4"), ""),
    "ep": {n: f"--expert-model-parallel-size {n}" for n in ("1", "2", "4")},
    "etp": {n: f"--expert-tensor-parallel-size {n}" for n in ("1", "2")},
    "dispatcher": {name: f"--moe-token-dispatcher-type {name}" for name in ("allgather", "alltoall")},
    "experts": {"sequential": "", "grouped": "--moe-grouped-gemm"},
    "sharding": {"none": "", "optimizer": "--use-distributed-optimizer"},
    "overlap": {
        "none": "",
        "gradients": "--overlap-grad-reduce --ddp-bucket-size 4000",
        "shared experts": "--moe-shared-expert-overlap",
    },
    "recompute": {
        "none": "",
        "experts": "--moe-layer-recompute",
        "whole": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "activations": "--recompute-granularity selective --recompute-modules moe_act",
        "latents": "--recompute-granularity selective --recompute-modules mla_up_proj core_attn",
    },
}
"""How work is divided over ranks, and how it is done."""

NUMERIC_AXES: dict[str, dict[str, str]] = {
    "balancing": {
        "aux_loss": "--moe-aux-loss-coeff 0.05",
        "seq_aux_loss": "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.05",
        "several": "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.03 0.05",
        "of the batch": "--moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.02 0.05",
        "bias": "--moe-router-load-balancing-type none --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1 --moe-router-topk-scaling-factor 2.5",
    },
    "drop": {
        "none": "",
        "probs": "--moe-expert-capacity-factor 1.0",
        "padded": "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity "
        "--moe-token-drop-policy position",
    },
    "shared experts": {
        "none": "",
        "one": "--moe-shared-expert-intermediate-size 16",
        "gated": "--moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate",
    },
    "attention": {"heads": "", "latent": f"{LATENT} --q-lora-rank 16", "latent keys": LATENT},
    "further tokens": {"none": "", "2": "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.5"},
    "output": {"tied": "", "untied": "--untie-embeddings-and-output-weights"},
    "documents": {"off": "", "isolated": "--reset-position-ids --reset-attention-mask --eod-mask-loss"},
    "tokens": {"even": "", "uneven": ""},
    "loss": {"per micro-batch": "", "per token": "--calculate-per-token-loss"},
}
"""What changes the numbers."""

ALL_AXES = {**LAYOUT_AXES, **NUMERIC_AXES}


def of_experts(tp: str, cp: str, dp: str, ep: str, etp: str) -> bool:
    """Whether the experts' groups divide the ranks of a stage."""
    return prod(map(int, (tp, cp, dp))) % (int(ep) * int(etp)) == 0


RULES = [
    Rule(("tp", "cp", "dp", "ep", "etp"), of_experts),
    Rule(("pp", "schedule"), lambda pp, schedule: schedule == "1f1b" or pp == "2"),
    Rule(
        ("overlap", "dispatcher", "shared experts"),
        lambda overlap, dispatcher, shared: (
            overlap != "shared experts" or (dispatcher == "alltoall" and shared != "none")
        ),
    ),
    Rule(("tp", "drop"), lambda tp, drop: drop == "none" or tp == "1"),  # a rank drops of its own tokens
    # One process has the micro-batches of all replicas as one: what else depends on its size must not.
    Rule(("balancing", "drop"), lambda balancing, drop: drop == "none" or balancing != "of the batch"),
    Rule(
        ("balancing", "documents", "tokens", "loss"),
        lambda balancing, documents, tokens, loss: (
            balancing != "of the batch" or loss == "per token" or (documents, tokens) == ("off", "even")
        ),
    ),
    Rule(("cp", "drop"), lambda cp, drop: drop == "none" or cp == "1"),
    Rule(("experts", "recompute"), lambda experts, what: what != "activations" or experts == "grouped"),
    Rule(("attention", "recompute"), lambda attention, what: what != "latents" or attention != "heads"),
]


def num_layers(row: Row) -> int:
    """Two, and as many as there are stages."""
    return max(2, int(row["pp"]) * (2 if row["schedule"] == "zb-v" else 1))


def num_ranks(row: Row) -> int:
    """Processes of a layout."""
    return prod(int(row[axis]) for axis in ("tp", "cp", "pp", "dp"))


@cache
def design(max_ranks: int) -> Design:
    """All axes; larger sizes are taken where they bring something."""
    prices = {(axis, n): axes.PRICE_OF_A_RANK * int(n) for axis in ("tp", "cp", "pp", "dp") for n in ALL_AXES[axis]}
    size = Rule(("tp", "pp", "dp", "cp"), lambda *sizes: prod(map(int, sizes)) <= max_ranks)
    return Design({name: list(values) for name, values in ALL_AXES.items()}, [size, *RULES], prices)


@cache
def fast_selection() -> list[Row]:
    """Every value in some layout of up to four ranks."""
    small = design(4)
    return small.cover(list(small.combinations(small.axes, 1)))


def pairs() -> list[Combination]:
    """Every two values of two axes that may stand together."""
    large = design(8)
    return list(large.combinations(large.axes, 2))


@cache
def matrix() -> list[Row]:
    """Every two values that may stand together, on up to eight ranks; then what planted mistakes need."""
    rows = design(8).cover(pairs(), fast_selection())
    for mutation in sparse_mutations.MUTATIONS:
        rows.append(smallest_layout(mutation.name))
    return list({name_of(row): row for row in rows}.values())


def smallest_layout(name: str) -> Row:
    """A layout in which a planted mistake matters, plain in all else."""
    row = design(8).completed(sparse_mutations.BY_NAME[name].smallest_layout())
    assert row is not None, name
    return row


def not_plain(row: Row) -> Row:
    """What distinguishes a layout from one process without anything special."""
    return {name: value for name, value in row.items() if value != next(iter(ALL_AXES[name]))}


def name_of(row: Row) -> str:
    """E.g. `tp=2 ep=2`: what is not plain."""
    return " ".join(f"{name}={value}" for name, value in not_plain(row).items()) or "plain"


TIED = {"ep": "4", "drop": "probs", "attention": "latent keys", "documents": "isolated"}
"""With the usual seed, two tokens that begin documents have one score for the last place of an expert there, in the
fourth step: rounding decides which one is dropped."""


def flags_of(row: Row, names: dict[str, dict[str, str]], steps: int) -> list[str]:
    """The command line with the values of these axes; see `TIED` for the seed."""
    words = [*BASE, "--num-layers", str(num_layers(row)), "--train-iters", str(steps)]
    words += ["--seed", "5"] if TIED.items() <= row.items() else []
    return words + [word for name, values in names.items() for word in values[row[name]].split()]


def deviations(row: Row, steps: int = STEPS, mutation: str | None = None) -> list[Deviation]:
    """How far a layout is from one process in float64, with a planted mistake or without one."""
    uneven = row["tokens"] == "uneven"
    words = flags_of(row, NUMERIC_AXES, steps)
    if row["balancing"] == "of the batch":  # it depends on how many micro-batches a replica has in a step
        words += ["--micro-batch-size", row["dp"]]
    reference = reference_run(tuple(words), uneven)

    def measured(**options: Any) -> list[Deviation]:
        found = run_ranks(num_ranks(row), run_here, flags_of(row, ALL_AXES, steps), uneven, options)[0]
        return compare(found, reference)

    if mutation is not None:
        return measured(mutation=mutation)
    return but_for_rounding(measured(), lambda: measured(in_float64=True))


@lru_cache(maxsize=64)
def reference_run(words: tuple[str, ...], uneven: bool) -> Measurement:
    """One process in float64."""
    found: Measurement = run_ranks(1, run_here, list(words), uneven, {"in_float64": True})[0]
    return found


def run_here(words: list[str], uneven: bool, options: dict[str, Any]) -> Measurement | None:
    """One rank's part of a run; the measurement on rank 0."""
    import pretrain_gpt

    options = dict(options)
    name = options.pop("mutation", None)
    mistake = planted(None if name is None else sparse_mutations.BY_NAME[name])
    quiet = io.StringIO()
    with mistake, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        program = Program(pretrain_gpt.model_provider, pretrain_gpt.forward_step)
        return measure(program, words, Samples(uneven), **options)
