"""Which pipeline stage holds which layers, when the user spells it out (`Ett|(tt|)*2,ttL`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType

LETTERS = {
    "E": LayerType.embedding,
    "t": LayerType.decoder,
    "m": LayerType.mtp,
    "L": LayerType.loss,
}


class PipelineParallelLayerLayout:
    """The layers of every pipeline chunk; `layout[p][v]` lists those of virtual stage v on pipeline rank p.

    Chunks are given in the order in which activations pass through them: entry i of the string or list
        belongs to
    virtual stage i // pipeline size on rank i % pipeline size.

    Raises:
        ValueError: the letters, the repetition or the number of stages make no layout.
    """

    def __init__(self, layout: str | Sequence[Sequence[str | LayerType]], pipeline_model_parallel_size: int) -> None:
        self.input_data = layout
        stages = self.parse_str_to_list(layout) if isinstance(layout, str) else [_as_types(stage) for stage in layout]
        if not stages or len(stages) % pipeline_model_parallel_size:
            raise ValueError(
                f"pipeline_model_parallel_layout {layout!r} has {len(stages)} stages, no multiple of "
                f"pipeline_model_parallel_size ({pipeline_model_parallel_size})"
            )
        self.stages = stages
        self.pipeline_model_parallel_size = pipeline_model_parallel_size
        self.virtual_pipeline_model_parallel_size = len(stages) // pipeline_model_parallel_size
        self.layout = [stages[rank::pipeline_model_parallel_size] for rank in range(pipeline_model_parallel_size)]

    @staticmethod
    def from_str(layout: str, pipeline_model_parallel_size: int) -> PipelineParallelLayerLayout:
        """The layout that a string such as `Et*3|(tt|)*2,ttL` describes."""
        return PipelineParallelLayerLayout(layout, pipeline_model_parallel_size)

    @staticmethod
    def parse_str_to_list(layout_str: str) -> list[list[LayerType]]:
        """Layers of each stage; `|` separates stages, `x*n` and `(xyz)*n` repeat, commas only help the
        eye."""
        text = re.sub(r"[,\s]", "", layout_str)
        text = re.sub(r"\(([^()]+)\)\*(\d+)", lambda found: found[1] * int(found[2]), text)
        text = re.sub(r"([^()*\d])\*(\d+)", lambda found: found[1] * int(found[2]), text)
        unknown = sorted(set(text) - set(LETTERS) - {"|"})
        if unknown:
            raise ValueError(
                f"pipeline_model_parallel_layout {layout_str!r}: cannot read {' '.join(unknown)}; stages "
                "are made of E (embedding), t (transformer layer), m (MTP layer), L (loss), separated by |, "
                "repeated by x*n or (xyz)*n"
            )
        return [[LETTERS[letter] for letter in stage] for stage in text.split("|")]

    @staticmethod
    def get_num_stages_from_str(layout: str) -> int:
        """Number of stages (pipeline ranks times virtual stages) that the string describes."""
        return len(PipelineParallelLayerLayout.parse_str_to_list(layout))

    def validate_layer_layout(self, num_layers: int, mtp_num_layers: int | None = None) -> None:
        """Raise unless one embedding comes first, one loss last, and `num_layers` transformer layers between
        them; the modules that predict further tokens, if they are named, stand before the loss on its stage.

        Raises:
            ValueError: they do not.
            NotImplementedError: there are encoder layers.
        """
        flat = [layer for stage in self.stages for layer in stage]
        if LayerType.encoder in flat:
            raise NotImplementedError(f"pipeline_model_parallel_layout {self} with encoder layers")
        named, wanted = flat.count(LayerType.mtp), mtp_num_layers or 0
        if named and (named != wanted or self.stages[-1][-1 - named : -1] != [LayerType.mtp] * named):
            raise ValueError(
                f"pipeline_model_parallel_layout {self} has {named} modules for further tokens (m), mtp_num_layers is "
                f"{wanted}: leave m out, or name them all between the last t and the L of the last stage"
            )
        if flat.count(LayerType.embedding) != 1 or self.stages[0][:1] != [LayerType.embedding]:
            raise ValueError(f"pipeline_model_parallel_layout {self} must begin with its only E")
        if flat.count(LayerType.loss) != 1 or self.stages[-1][-1:] != [LayerType.loss]:
            raise ValueError(f"pipeline_model_parallel_layout {self} must end with its only L")
        if flat.count(LayerType.decoder) != num_layers:
            raise ValueError(
                f"pipeline_model_parallel_layout {self} has {flat.count(LayerType.decoder)} transformer "
                f"layers (t), num_layers is {num_layers}"
            )

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Number of layers of this type in a chunk; `pp_rank` None means this rank's."""
        return self._chunk(vp_stage, pp_rank).count(layer_type)

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Number of layers of this type in all chunks before this one."""
        rank = _this_rank() if pp_rank is None else pp_rank
        position = (vp_stage or 0) * self.pipeline_model_parallel_size + rank
        return sum(stage.count(layer_type) for stage in self.stages[:position])

    def get_layer_id_list(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> list[int]:
        """0-based global numbers of the chunk's layers of this type."""
        offset = self.get_layer_offset(layer_type, vp_stage, pp_rank)
        return list(range(offset, offset + self.get_num_layers_to_build(layer_type, vp_stage, pp_rank)))

    def pretty_repr(self) -> str:
        """One line for each chunk, for a log."""
        size = self.pipeline_model_parallel_size
        return "\n".join(
            f"virtual stage {i // size}, rank {i % size}: " + (" ".join(layer.name for layer in stage) or "(empty)")
            for i, stage in enumerate(self.stages)
        )

    def __str__(self) -> str:
        names = {layer: letter for letter, layer in LETTERS.items()}
        return "|".join("".join(names.get(layer, f"({layer.name})") for layer in stage) for stage in self.stages)

    def __repr__(self) -> str:
        return f"PipelineParallelLayerLayout({str(self)!r}, {self.pipeline_model_parallel_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PipelineParallelLayerLayout) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash((str(self), self.pipeline_model_parallel_size))

    def _chunk(self, vp_stage: int | None, pp_rank: int | None) -> list[LayerType]:
        return self.layout[_this_rank() if pp_rank is None else pp_rank][vp_stage or 0]


def _as_types(stage: Sequence[str | LayerType]) -> list[LayerType]:
    """Layer types of one stage given as members, their names or their letters."""
    types = []
    for layer in stage:
        if isinstance(layer, LayerType):
            types.append(layer)
        elif layer in LETTERS:
            types.append(LETTERS[layer])
        elif layer in LayerType.__members__:
            types.append(LayerType[layer])
        else:
            raise ValueError(f"pipeline_model_parallel_layout: {layer!r} is none of {', '.join(LayerType.__members__)}")
    return types


def _this_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()
