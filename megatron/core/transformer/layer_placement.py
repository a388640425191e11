"""Which transformer layers a pipeline chunk holds: arithmetic only, no processes.

L layers, P pipeline ranks, V virtual stages on each; chunk (p, v) is virtual stage v of rank p. Activations
pass through (0, 0), (1, 0), ..., (P-1, 0), (0, 1), ... Layers are counted from 0 over the whole model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide


class LayerRange(NamedTuple):
    """The layers `offset`, ..., `offset + num_layers - 1` of the model."""

    offset: int
    num_layers: int


def layers_of_chunk(config: TransformerConfig, pp_rank: int, vp_stage: int | None = None) -> LayerRange:
    """The layers of virtual stage `vp_stage` on pipeline rank `pp_rank`.

    Raises:
        ValueError: the layers do not divide over the stages.
    """
    stage = vp_stage or 0
    layout = layout_of(config)
    if layout is not None:
        return LayerRange(
            layout.get_layer_offset(vp_stage=stage, pp_rank=pp_rank),
            layout.get_num_layers_to_build(vp_stage=stage, pp_rank=pp_rank),
        )
    if config.num_layers_in_first_pipeline_stage is None and config.num_layers_in_last_pipeline_stage is None:
        return _even_chunk(config, pp_rank, stage)
    return _uneven_chunk(config, pp_rank, stage)


def layout_of(config: TransformerConfig) -> PipelineParallelLayerLayout | None:
    """The checked layout of a configuration that spells it out, else None.

    Raises:
        ValueError: it does not hold the model's layers, or does not fit the pipeline.
    """
    given: str | list[Any] | PipelineParallelLayerLayout | None = config.pipeline_model_parallel_layout
    if given is None or isinstance(given, PipelineParallelLayerLayout):
        return given
    layout = PipelineParallelLayerLayout(given, config.pipeline_model_parallel_size)
    layout.validate_layer_layout(config.num_layers)
    return layout


def _even_chunk(config: TransformerConfig, pp_rank: int, vp_stage: int) -> LayerRange:
    """Equal shares, where embedding and loss may each count as a layer that is taken from the first and last
    chunk."""
    embedding = int(config.account_for_embedding_in_pipeline_split)
    loss = int(config.account_for_loss_in_pipeline_split)
    num_stages, num_virtual = (
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size or 1,
    )
    share = divide(divide(config.num_layers + embedding + loss, num_stages), num_virtual)
    position = vp_stage * num_stages + pp_rank
    is_first, is_last = position == 0, position == num_stages * num_virtual - 1
    offset = position * share - (0 if is_first else embedding)
    return LayerRange(offset, share - is_first * embedding - is_last * loss)


def _uneven_chunk(config: TransformerConfig, pp_rank: int, vp_stage: int) -> LayerRange:
    """First and last ranks with a number of layers of their own, the others share the rest equally."""
    num_stages, num_virtual = (
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size or 1,
    )
    per_rank = layers_per_rank(
        config.num_layers,
        num_stages,
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )
    shares = [divide(layers, num_virtual) for layers in per_rank]
    return LayerRange(vp_stage * sum(shares) + sum(shares[:pp_rank]), shares[pp_rank])


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
