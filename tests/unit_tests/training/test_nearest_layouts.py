"""A refused layout comes with the nearest ones that work, and what is suggested does work."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron.training.arguments import parse_args, validate_args
from megatron.training.rules.nearest import Layout, candidates, distance, nearest_layouts, neighbours
from megatron.training.settings import ConfigurationError
from tests.unit_tests.training.settings_for_tests import SMALL_GPT, validated

# --- the search -----------------------------------------------------------------------------------


def test_nearest_keeps_what_it_can() -> None:
    found = nearest_layouts(Layout(tensor=4, pipeline=2), 8, lambda layout: 6 % layout.tensor == 0)
    assert [(layout.tensor, layout.pipeline) for layout in found] == [(2, 2), (2, 4), (2, 1)]


def test_size_of_a_model_copy_breaks_ties() -> None:
    """Of two halvings and doublings the one that leaves a rank's memory as it is comes first."""
    found = nearest_layouts(Layout(tensor=4), 8, lambda layout: layout.tensor < 4)
    assert found[0] == Layout(tensor=2)
    assert distance(Layout(tensor=4), Layout(tensor=2, pipeline=2)) < distance(Layout(tensor=4), Layout(tensor=1))


def test_context_parallelism_is_not_suggested_to_who_has_none() -> None:
    assert all(layout.context == 1 for layout in candidates(Layout(tensor=2), 16))
    assert any(layout.context == 4 for layout in candidates(Layout(context=2), 16))


def test_candidates_fit_the_world_and_come_nearest_first() -> None:
    wanted = Layout(tensor=2, pipeline=3, chunks=2)
    listed = list(candidates(wanted, 12))
    distances = [distance(wanted, layout) for layout in listed]
    assert distances == sorted(distances) and wanted not in listed
    assert all(12 % layout.ranks == 0 for layout in listed)
    assert {layout.chunks for layout in listed if layout.pipeline == 1} == {1}


def test_no_layout_is_better_than_a_wrong_one() -> None:
    assert nearest_layouts(Layout(tensor=2), 8, lambda layout: False) == []


@pytest.mark.parametrize("number, step", list(itertools.product(range(1, 12), range(1, 6))))
def test_neighbours(number: int, step: int) -> None:
    multiples = [step * i for i in range(1, 20)]
    below, above = [m for m in multiples if m < number], [m for m in multiples if m > number]
    assert neighbours(number, step) == ([] if number % step == 0 else below[-1:]) + above[:1]


# --- in messages ----------------------------------------------------------------------------------

REFUSED = {
    "heads": ("--tensor-model-parallel-size 8", 8, "--num-attention-heads"),
    "query groups": (
        "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
        8,
        "--num-query-groups",
    ),
    "feed-forward": ("--tensor-model-parallel-size 4 --ffn-hidden-size 130", 8, "--ffn-hidden-size"),
    "stages": ("--pipeline-model-parallel-size 3", 6, "--num-layers"),
    "edge stages": ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3", 4, "--decoder-first"),
    "counted loss": ("--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split", 4, "counted as 5"),
    "sequence": ("--tensor-model-parallel-size 4 --sequence-parallel --seq-length 126", 8, "--seq-length"),
    "world": ("--tensor-model-parallel-size 4", 6, "WORLD_SIZE"),
    "world of one": ("--tensor-model-parallel-size 2", 1, "WORLD_SIZE"),
    "batch": ("--global-batch-size 12", 4, "--global-batch-size"),
    "batch below ranks": ("--global-batch-size 4 --pipeline-model-parallel-size 2", 8, "--global-batch-size"),
}


def message_of(flags: str, world_size: int) -> str:
    with pytest.raises(ConfigurationError) as refusal:
        validated(flags, world_size=world_size)
    return str(refusal.value)


def follow(flags: str, advice: str, world_size: int) -> None:
    """Run the rules on the command line with a line of advice applied to it; they must pass."""
    given = {word.split()[0]: word for word in re.findall(r"--\S+(?: [^-\s]\S*)?", flags)}
    advised, _, left_out = re.sub(r" \(data.*\)", "", advice).partition(" without ")
    for flag in re.findall(r"--\S+", left_out):
        given.pop(flag)
    given |= {word.split()[0]: word for word in re.findall(r"--\S+(?: [^-\s]\S*)?", advised)}
    args = parse_args(argv=[*SMALL_GPT.split(), *" ".join(given.values()).split()])
    args.world_size = world_size
    validate_args(args)
    size = re.search(r"data parallel size (\d+)", advice)
    assert size is None or args.data_parallel_size == int(size[1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_suggested_works(name: str) -> None:
    flags, world_size, reason = REFUSED[name]
    message = message_of(flags, world_size)
    rule, *advice = message.split("\n")
    assert reason in rule
    layouts = [line.strip() for line in advice if line.startswith("  ")]
    assert layouts and len(set(layouts)) == len(layouts) <= 3
    for line in layouts:
        follow(flags, line, world_size)
    for processes in re.findall(r"\d+", "".join(re.findall(r"work with ([\d or]+) process", message))):
        follow(flags, "", int(processes))
    for size in re.findall(r"\d+", "".join(re.findall(r"work with --global-batch-size ([\d or]+)", message))):
        follow(flags, f"--global-batch-size {size}", world_size)


def test_other_numbers_of_processes_and_samples() -> None:
    assert "this layout would work with 4 or 8 processes" in message_of("--tensor-model-parallel-size 4", 6)
    assert "work with --global-batch-size 8 or 16" in message_of("--global-batch-size 12", 4)


def test_a_refusal_that_no_layout_mends_suggests_none() -> None:
    assert message_of("--save x", 8).count("\n") == 0


def test_saved_vocabulary_must_divide() -> None:
    args = parse_args(argv=[*SMALL_GPT.split(), "--tensor-model-parallel-size", "4"])
    args.world_size, args.padded_vocab_size = 4, 102
    with pytest.raises(ConfigurationError, match=r"padded vocabulary \(102\).*\n.*\n  --tensor-model-parallel-size 2"):
        validate_args(args)
