"""Which transformer layers a pipeline chunk holds: arithmetic only, no processes.

P pipeline ranks with V virtual stages (model chunks) on each; `stage_placement` says in which order activations pass
through them. Layers are counted from 0 over the whole model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron.core.stage_placement import placement_of
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide


class LayerRange(NamedTuple):
    """The layers `offset`, ..., `offset + num_layers - 1` of the model."""

    offset: int
    num_layers: int


def layers_of_chunk(config: TransformerConfig, pp_rank: int, vp_stage: int | None = None) -> LayerRange:
    """The layers of virtual stage `vp_stage` on rank `pp_rank` of the whole pipeline.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    counts = layers_of_stages(config)
    stage = placement_of(config).stage_of(pp_rank - (config.pipeline_model_parallel_split_rank or 0), vp_stage or 0)
    return LayerRange(sum(counts[:stage]), counts[stage])


def layers_of_stages(config: TransformerConfig) -> list[int]:
    """Number of layers of each virtual stage, in the order in which activations pass.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    layout = layout_of(config)
    if layout is not None:
        return [stage.count(LayerType.decoder) for stage in layout.stages]
    if config.num_layers_in_first_pipeline_stage is None and config.num_layers_in_last_pipeline_stage is None:
        return _equal_shares(config)
    return _shares_of_uneven_ranks(config)


def layout_of(config: TransformerConfig) -> PipelineParallelLayerLayout | None:
    """The checked layout of a configuration that spells it out, else None.

    Raises:
        ValueError: it does not hold the model's layers, or does not fit the pipeline.
    """
    given: str | list[Any] | PipelineParallelLayerLayout | None = config.pipeline_model_parallel_layout
    if given is None or isinstance(given, PipelineParallelLayerLayout):
        return given
    layout = PipelineParallelLayerLayout(given, config.pipeline_model_parallel_size)
    layout.validate_layer_layout(config.num_layers, config.mtp_num_layers)
    return layout


def _equal_shares(config: TransformerConfig) -> list[int]:
    """Equal shares, where embedding and loss may each count as a layer that is taken from the first and last
    stage."""
    embedding = int(config.account_for_embedding_in_pipeline_split)
    loss = int(config.account_for_loss_in_pipeline_split)
    ranks, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    counts = [divide(divide(config.num_layers + embedding + loss, ranks), chunks)] * (ranks * chunks)
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _shares_of_uneven_ranks(config: TransformerConfig) -> list[int]:
    """First and last ranks with a number of layers of their own, the others share the rest equally; each rank divides
    its layers equally over its chunks."""
    placement = placement_of(config)
    per_rank = layers_per_rank(
        config.num_layers,
        placement.num_ranks,
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )
    shares = [divide(layers, placement.num_chunks) for layers in per_rank]
    return [shares[placement.holder_of(stage).rank] for stage in range(placement.num_stages)]


def layers_per_rank(num_layers: int, num_stages: int, first: int | None, last: int | None) -> list[int]:
    """Layers of each pipeline rank when the first or last has a given number.

    >>> layers_per_rank(24, 4, first=4, last=6)
    [4, 7, 7, 6]
    """
    given = {rank: layers for rank, layers in ((0, first), (num_stages - 1, last)) if layers is not None}
    rest = num_layers - sum(given.values())
    num_middle = num_stages - len(given)
    share = divide(rest, num_middle) if num_middle else 0
    return [given.get(rank, share) for rank in range(num_stages)]
