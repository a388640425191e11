"""Which layers a pipeline chunk holds: tabled examples, and that every layer is held once."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.layer_placement import layers_of_chunk, layers_per_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


def config(num_layers: int, pp: int, vpp: int | None = None, **kwargs: object) -> SimpleNamespace:
    """The fields that matter here."""
    defaults = {
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None,
        "pipeline_schedule": "auto",
        "pipeline_model_parallel_split_rank": None,
        "mtp_num_layers": None,
    }
    return SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **{**defaults, **kwargs},
    )


def table(c: SimpleNamespace) -> list[list[tuple[int, int]]]:
    stages = range(c.virtual_pipeline_model_parallel_size or 1)
    return [
        [tuple(layers_of_chunk(c, rank, stage)) for stage in stages] for rank in range(c.pipeline_model_parallel_size)
    ]


def test_a_decoder_behind_an_encoder_counts_its_own_stages() -> None:
    decoder = config(4, 2, pipeline_model_parallel_split_rank=3)
    assert [layers_of_chunk(decoder, rank) for rank in (3, 4)] == [(0, 2), (2, 2)]


BOTH = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            (24, 4, 3, {}),
            [
                [(0, 2), (8, 2), (16, 2)],
                [(2, 2), (10, 2), (18, 2)],
                [(4, 2), (12, 2), (20, 2)],
                [(6, 2), (14, 2), (22, 2)],
            ],
        ),
        (
            (24, 4, None, {"num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 6}),
            [[(0, 4)], [(4, 7)], [(11, 7)], [(18, 6)]],
        ),
        (
            (24, 4, 2, {"num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 4}),
            [[(0, 2), (12, 2)], [(2, 4), (14, 4)], [(6, 4), (18, 4)], [(10, 2), (22, 2)]],
        ),
        ((22, 4, None, BOTH), [[(0, 5)], [(5, 6)], [(11, 6)], [(17, 5)]]),
        ((22, 4, 2, BOTH), [[(0, 2), (11, 3)], [(2, 3), (14, 3)], [(5, 3), (17, 3)], [(8, 3), (20, 2)]]),
        (
            (8, 2, 2, {"pipeline_model_parallel_layout": "Ett|(tt|)*2,ttL"}),
            [[(0, 2), (4, 2)], [(2, 2), (6, 2)]],
        ),
    ],
)
def test_tabled_examples(settings: tuple, expected: list) -> None:
    num_layers, pp, vpp, others = settings
    assert table(config(num_layers, pp, vpp, **others)) == expected


@pytest.mark.parametrize("first", [None, 1, 2, 4])
@pytest.mark.parametrize("last", [None, 1, 2, 4])
@pytest.mark.parametrize(("pp", "vpp"), [(2, None), (4, None), (4, 2), (3, 2)])
def test_every_layer_is_held_once_in_order(first: int | None, last: int | None, pp: int, vpp: int | None) -> None:
    v = vpp or 1
    middle = pp - sum(x is not None for x in (first, last))
    first, last = (None if x is None else x * v for x in (first, last))
    c = config(
        (first or 0) + (last or 0) + middle * 2 * v,
        pp,
        vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    chunks = [layers_of_chunk(c, rank, stage) for stage, rank in itertools.product(range(v), range(pp))]
    held = [layer for offset, count in chunks for layer in range(offset, offset + count)]
    assert held == list(range(c.num_layers))


def test_layers_per_rank() -> None:
    assert layers_per_rank(24, 4, first=4, last=6) == [4, 7, 7, 6]
    assert layers_per_rank(9, 4, first=None, last=3) == [2, 2, 2, 3]


# --- layouts spelled out --------------------------------------------------------------------------------


def test_layout_repetition_and_commas() -> None:
    layout = PipelineParallelLayerLayout.from_str("E,t*3|(tt|)*2,t*0tL", 2)
    assert str(layout) == "Ettt|tt|tt|tL"
    assert PipelineParallelLayerLayout.get_num_stages_from_str("Et|(t|)*2tL") == 4
    assert layout.virtual_pipeline_model_parallel_size == 2
    assert layout.get_layer_id_list(vp_stage=1, pp_rank=0) == [5, 6]
    assert layout.get_num_layers_to_build(LayerType.loss, vp_stage=1, pp_rank=1) == 1
    assert layout.get_layer_offset(LayerType.embedding, vp_stage=0, pp_rank=1) == 1
    assert "virtual stage 1, rank 1: decoder loss" in layout.pretty_repr()


def test_layout_as_lists_and_empty_stages() -> None:
    layout = PipelineParallelLayerLayout([["embedding", "t"], [], [LayerType.decoder], ["loss"]], 4)
    layout.validate_layer_layout(2)
    assert layout == PipelineParallelLayerLayout("Et||t|L", 4)
    assert "(empty)" in layout.pretty_repr()


@pytest.mark.parametrize(
    ("text", "pp", "layers", "message"),
    [
        ("Et|tL|", 2, 2, "3 stages, no multiple of"),
        ("Etx|tL", 2, 2, "cannot read x"),
        ("tE|tL", 2, 2, "begin with its only E"),
        ("Et|Lt", 2, 2, "end with its only L"),
        ("EtE|tL", 2, 2, "only E"),
        ("Et|tL", 2, 3, "num_layers is 3"),
    ],
)
def test_bad_layouts(text: str, pp: int, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineParallelLayerLayout(text, pp).validate_layer_layout(layers)


def test_modules_for_further_tokens_stand_before_the_loss() -> None:
    PipelineParallelLayerLayout("Et|tmL", 2).validate_layer_layout(2, 1)
    with pytest.raises(ValueError, match=r"has 1 modules for further tokens \(m\), mtp_num_layers is 0"):
        PipelineParallelLayerLayout("Et|tmL", 2).validate_layer_layout(2)
    with pytest.raises(ValueError, match="of the last stage"):
        PipelineParallelLayerLayout("Etm|tL", 2).validate_layer_layout(2, 1)
