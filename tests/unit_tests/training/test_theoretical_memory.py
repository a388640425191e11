"""The memory report: tabled numbers, and the formula where they do not reach."""

from __future__ import annotations

import pytest

from megatron.training.settings import Settings
from megatron.training.theoretical_memory_usage import count_parameters, report_theoretical_memory, theoretical_memory
from tests.unit_tests.training.settings_for_tests import validated

GPT_345M = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 4 --recompute-activations"
)


def settings(**changes: object) -> Settings:
    # The formula assumes sequence parallelism, also where one rank makes it do nothing.
    return validated(GPT_345M).variant(padded_vocab_size=50304, sequence_parallel=True, **changes)


def test_tabled_model_on_one_rank() -> None:
    assert report_theoretical_memory(settings()) == (
        "Theoretical memory footprints: weight and optimizer=6069.97 MB, activation=4070.03 MB, total=10140.00 MB\n"
    )


def test_tabled_model_on_many_ranks() -> None:
    args = settings(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        data_parallel_size=8,
        use_distributed_optimizer=True,
        untie_embeddings_and_output_weights=True,
    )
    assert report_theoretical_memory(args, num_microbatches=8) == (
        "Theoretical memory footprints: weight and optimizer=454.31 MB, activation=2050.08 MB, total=2504.39 MB\n"
    )


@pytest.mark.parametrize("changes", [{"sequence_parallel": False}, {"recompute_granularity": "full"}])
def test_activations_are_left_out_where_the_formula_does_not_hold(changes: dict[str, object]) -> None:
    args = settings().variant(**changes)
    assert report_theoretical_memory(args) == ("Theoretical memory footprints: weight and optimizer=6069.97 MB\n")


@pytest.mark.parametrize("num_microbatches", [None, 1, 3, 4, 100])
def test_a_pipeline_holds_no_more_than_the_microbatches_there_are(num_microbatches: int | None) -> None:
    s, b, h, f, layers, stages = 1024, 4, 1024, 4096, 24, 4
    whole = s * b * h * (18 + 4 * f / h) * layers + 8 * s * b * stages + s * b * h * stages
    in_flight = 1 if num_microbatches is None else min(1, num_microbatches / stages)
    memory = theoretical_memory(settings(pipeline_model_parallel_size=4), num_microbatches)
    assert memory.activations == pytest.approx(whole * in_flight, rel=1e-12)


def test_grouped_queries_gates_and_untied_embeddings_count() -> None:
    h, f, layers, vocabulary, groups, heads = 1024, 4096, 24, 50304, 4, 16
    attention = 2 * h * h * (1 + groups / heads)
    parameters = layers * (2 * h * (f * 1.5 + 2) + attention) + 2 * h + 2 * h * vocabulary
    args = settings(
        group_query_attention=True, num_query_groups=groups, swiglu=True, untie_embeddings_and_output_weights=True
    )
    assert theoretical_memory(args).weights_and_optimizer == 18 * parameters


def test_verbose_report_of_many_ranks() -> None:
    args = settings(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        untie_embeddings_and_output_weights=True,
    )
    *lines, _, end = report_theoretical_memory(args, num_microbatches=2, verbose=True).split("\n")
    block = 24 * (12 * 1024**2 + 4 * 1024) + 2 * 1024
    table = 1024 * 50304
    assert lines == [
        f"Number of parameters in transformer block in billions: {block / 1e9:.2f}",
        f"Number of parameters in embedding layers in billions: {2 * table / 1e9:.2f}",
        f"Total number of parameters in billions: {(block + 2 * table) / 1e9:.2f}",
        f"Number of parameters in most loaded shard in billions: {(block / 4 + table) / 2 / 1e9:.4f}",
        f"Number of parameters in other shards in billions: {block / 8 / 1e9:.4f}",
        "Activation memory footprint per transformer layer: 68.0 MB",  # 34 s b h / tp
        "Memory penalty from interleaved schedule: 1.25",
        "Number of in-flight microbatches: 2",
    ]
    assert end == ""


def test_verbose_report_of_one_rank() -> None:
    lines = report_theoretical_memory(settings().variant(sequence_parallel=False), verbose=True).splitlines()
    assert [line.split(" in billions")[0] for line in lines[:-1]] == [
        "Number of parameters in transformer block",
        "Number of parameters in embedding layers",
        "Total number of parameters",
        "Number of parameters in most loaded shard",
    ]


def test_types_of_the_optimizers_state_count() -> None:
    """2 for bf16 weights, 2 for their gradients, and of main weights, fp8 and bf16 moments each rank's half."""
    aware = "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer --main-grads-dtype bf16"
    args = validated(f"{aware} --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16", world_size=2).variant(
        padded_vocab_size=128
    )
    plain = validated("--bf16 --use-distributed-optimizer", world_size=2).variant(padded_vocab_size=128)
    ratio = theoretical_memory(args).weights_and_optimizer / theoretical_memory(plain).weights_and_optimizer
    assert ratio == (2 + 2 + (2 + 1 + 2) / 2) / (6 + 12 / 2)


def test_weights_in_fp8_spare_a_byte_in_the_layers() -> None:
    flags = "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --use-distributed-optimizer"
    found = [
        theoretical_memory(validated(f"{flags} {more}").variant(padded_vocab_size=128)).weights_and_optimizer
        for more in ("", "--fp8-param-gather", "--fp8-param-gather --first-last-layers-bf16")
    ]
    block = count_parameters(validated(flags).variant(padded_vocab_size=128)).block
    assert found[0] - found[1] == block
    assert found[0] - found[2] == block / 2, "of four layers, the first and the last stay as they are"
