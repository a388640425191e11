"""The `torch` format, one file for each place in the model-parallel grid, as whole tensors, and written from them.

Files are mapped: a tensor costs memory when it is read. Writing makes files of holes and fills them parameter by
parameter.
"""

from __future__ import annotations

import mmap
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.durable import FileRecord, checksum_of_file
from megatron.core.dist_checkpointing.manifest import write_manifest
from megatron.core.dist_checkpointing.safe_load import safe_torch_load

from .legacy import flatten, from_legacy_name, is_legacy, reorder_rows
from .mixer_parts import sections_of
from .partition import cut, join
from .weights import ModelShape, is_gated
from .whole_state import WholeState, expert_of, plain_name, with_expert_offset, with_layer_offset

MODEL_FNAME = "model_optim_rng.pt"
_PLACE = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


# --- reading --------------------------------------------------------------------------------------------


class RankFilesState(WholeState):
    """The model in a `torch` checkpoint of any layout, of these classes or the older ones.

    Args:
        directory: has `mp_rank_*`.
        block: what the layers of older checkpoints stand in here, `decoder` or `encoder`.

    Raises:
        CheckpointingException: files are missing, damaged, or of another kind of model.
    """

    def __init__(self, directory: str | Path, block: str = "decoder") -> None:
        self.directory = Path(directory)
        places = _places(self.directory)
        self.common = _read_file(places[min(places)])
        saved = vars(self.common["args"]) if hasattr(self.common.get("args"), "__dict__") else {}
        grid = _grid(self.directory, places, saved)
        self.version = float(self.common.get("checkpoint_version", 0) or 0)
        self.settings: dict[str, Any] = dict(saved)
        self.legacy = is_legacy(_chunks(self.common)[0])
        self._gated = is_gated(saved)
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._heads = saved["num_attention_heads"] // len(grid[0][0]) if self.version < 2 else 0
        stages = [[[_chunks(_read_file(path)) for path in ranks] for ranks in stage] for stage in grid]
        depth: dict[str, int] = defaultdict(int)  # layers before a chunk, for each block
        for chunk in range(len(stages[0][0][0])):
            for stage in stages:
                named = [[self._named(rank[chunk], block) for rank in ranks] for ranks in stage]
                self._add([_with_all_experts(parts) for parts in zip(*named)], depth)
        if not saved.get("untie_embeddings_and_output_weights"):
            self._parts.pop("output_layer.weight", None)  # a copy on the last stage

    def _named(self, model: Mapping[str, Any], block: str) -> dict[str, Tensor]:
        flat = flatten(model)
        if not self.legacy:
            return {plain_name(name): tensor for name, tensor in _one_by_one(flat).items()}
        try:
            named = {from_legacy_name(name, block): tensor for name, tensor in flat.items()}
        except ValueError as error:
            raise CheckpointingException(f"{self.directory}: {error}") from error
        return {name: tensor for name, tensor in named.items() if name is not None}

    def _add(self, ranks: Sequence[dict[str, Tensor]], depth: dict[str, int]) -> None:
        counts: dict[str, int] = defaultdict(int)
        for name in ranks[0]:
            match = re.match(r"(\w+)\.layers\.(\d+)\.", name)
            if match is not None:
                counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
            if any(name not in rank for rank in ranks):
                raise CheckpointingException(f"{self.directory}: some tensor parallel ranks have no {name}")
            ours = with_layer_offset(name, depth[match[1]]) if match is not None else name
            self._parts[ours] = [rank[name] for rank in ranks]
        for block, count in counts.items():
            depth[block] += count

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def meta(self, name: str) -> Tensor:
        return join(name, [part.to("meta") for part in self._parts[name]], self._gated, self._sections(name))

    def read(self, name: str) -> Tensor:
        parts = self._parts[name]
        if self.version < 2:
            parts = [reorder_rows(name, part, self._heads, self.version) for part in parts]
        return join(name, parts, self._gated, self._sections(name))

    def _sections(self, name: str) -> list[int] | None:
        return sections_of(name, lambda other: self._parts[other][0].shape)


def _one_by_one(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, where a rank may hold its experts as stacks of matrices."""
    found: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        stack = re.fullmatch(r"(.*\.experts)\.weight([12])", name)
        if stack is None:
            found[name] = tensor
        else:
            parts = enumerate(tensor)
            found.update({f"{stack[1]}.local_experts.{i}.linear_fc{stack[2]}.weight": part for i, part in parts})
    return found


def _with_all_experts(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the expert parallel ranks of one tensor parallel rank hold together, experts numbered in the whole model."""
    merged, here = dict(parts[0]), len({expert_of(name) for name in parts[0]} - {None})
    for number, part in enumerate(parts[1:], 1):
        of_experts = {name: tensor for name, tensor in part.items() if expert_of(name) is not None}
        merged.update({with_expert_offset(name, number * here): tensor for name, tensor in of_experts.items()})
    return merged


def _places(directory: Path) -> dict[tuple[int, int, int], Path]:
    """(first, second number after the tensor rank, or -1; tensor rank) -> file."""
    places: dict[tuple[int, int, int], Path] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        match = _PLACE.fullmatch(folder.name)
        if match is not None and (folder / MODEL_FNAME).is_file():
            second, third = (-1 if part is None else int(part) for part in (match[2], match[3]))
            places[second, third, int(match[1])] = folder / MODEL_FNAME
    if not places:
        raise CheckpointingException(f"{directory} has no mp_rank_*/{MODEL_FNAME}")
    return places


def _grid(
    directory: Path, places: Mapping[tuple[int, int, int], Path], saved: Mapping[str, Any]
) -> list[list[list[Path]]]:
    """Files [pipeline rank][expert rank][tensor rank].

    A name has the ranks of the axes with several ones, so that its second number may be of a stage or of experts.
    """
    of_experts = (saved.get("expert_model_parallel_size") or 1) > 1
    tensor, of_expert = saved.get("tensor_model_parallel_size"), saved.get("expert_tensor_parallel_size")
    if of_experts and of_expert not in (None, tensor):
        raise CheckpointingException(
            f"{directory}: experts are cut over {of_expert} and other weights over {tensor} tensor parallel ranks; "
            "only equal numbers can be read from format torch. Save as torch_dist instead"
        )
    found: dict[tuple[int, int, int], Path] = {}
    for (second, third, rank), path in places.items():
        stage, expert = (0, second) if of_experts and third < 0 else (second, third)
        found[max(stage, 0), max(expert, 0), rank] = path
    stages, experts, ranks = (1 + max(numbers) for numbers in zip(*found))
    wanted = list(product(range(stages), range(experts), range(ranks)))
    missing = [place for place in wanted if place not in found]
    if missing:
        listed = ", ".join(map(str, missing[:5]))
        raise CheckpointingException(
            f"{directory} has no complete set of mp_rank_*/{MODEL_FNAME}: "
            f"(pipeline, expert, tensor) rank {listed} missing"
        )
    return [[[found[s, e, r] for r in range(ranks)] for e in range(experts)] for s in range(stages)]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = safe_torch_load(path, mmap=True)
    except CheckpointingException as error:
        if "mmap" not in str(error):
            raise
        content = safe_torch_load(path)  # the format before zip files cannot be mapped
    if not isinstance(content, dict):
        raise CheckpointingException(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _chunks(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    keys = ["model"] if "model" in content else sorted((k for k in content if re.fullmatch(r"model\d+", k)), key=len)
    if not keys or not all(isinstance(content[key], Mapping) for key in keys):
        raise CheckpointingException(f"no model among {', '.join(map(str, content))}")
    return [content[key] for key in keys]


# --- writing --------------------------------------------------------------------------------------------


def stage_of(name: str, shape: ModelShape, stages: int) -> int:
    """The pipeline stage that holds a parameter, of stages with equal numbers of layers."""
    if stages == 1:
        return 0
    match = re.search(r"\blayers\.(\d+)\.", name)
    if match is not None:
        return int(match[1]) // (shape.num_layers // stages)
    return 0 if name.startswith("embedding.") else stages - 1


@dataclass(frozen=True)
class RankSizes:
    """A layout that files of ranks are for. Experts are cut by `tensor` like everything else."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def folder(self, tensor_rank: int, stage: int, expert_rank: int) -> str:
        """Name of the folder of a place in it."""
        parts = [f"mp_rank_{tensor_rank:02d}"]
        parts += [f"{stage:03d}"] * (self.pipeline > 1) + [f"{expert_rank:03d}"] * (self.expert > 1)
        return "_".join(parts)


def write_rank_files(
    directory: Path,
    state: WholeState,
    shape: ModelShape,
    sizes: RankSizes,
    common: Mapping[str, Any],
    arrange: Callable[[dict[str, Tensor]], dict[str, Any]] = dict,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    copy_name: str = "output_layer.weight",
) -> None:
    """Write the `torch` format for a layout, with its manifest.

    Args:
        common: entries that all files have.
        arrange: parameters of a file, by our names with layers counted in the stage -> the value of `model`.
        copy_name: name of the tied output weight's copy on the last of several stages.

    Raises:
        CheckpointingException: the model does not divide over the layout.
    """
    if shape.num_layers % sizes.pipeline:
        raise CheckpointingException(f"{shape.num_layers} layers cannot be cut into {sizes.pipeline} equal stages")
    records: dict[str, FileRecord] = {}
    for stage, expert_rank in product(range(sizes.pipeline), range(sizes.expert)):
        names = _names_of(state, shape, sizes, stage, expert_rank)
        if shape.tied and 0 < stage == sizes.pipeline - 1:
            names[copy_name] = "embedding.word_embeddings.weight"
        folders = [sizes.folder(rank, stage, expert_rank) for rank in range(sizes.tensor)]
        for rank, folder in enumerate(folders):
            (directory / folder).mkdir()
            _write_holes(directory / folder / MODEL_FNAME, state, names, rank, sizes.tensor, shape, common, arrange)
        _fill([directory / folder / MODEL_FNAME for folder in folders], state, names, shape, arrange, on_progress)
        for folder in folders:
            path = directory / folder / MODEL_FNAME
            records[f"{folder}/{MODEL_FNAME}"] = FileRecord(path.stat().st_size, checksum_of_file(path))
    write_manifest(directory, records)


def _names_of(state: WholeState, shape: ModelShape, sizes: RankSizes, stage: int, expert_rank: int) -> dict[str, str]:
    """Name on a rank -> name in the whole model, of what the ranks of a stage and of a share of the experts hold."""
    layers, experts = shape.num_layers // sizes.pipeline, (shape.num_experts or 0) // sizes.expert
    names = {}
    for name in state:
        expert = expert_of(name)
        if stage_of(name, shape, sizes.pipeline) == stage and (expert is None or expert // experts == expert_rank):
            names[with_expert_offset(with_layer_offset(name, -stage * layers), -expert_rank * experts)] = name
    return names


def _write_holes(
    path: Path,
    state: WholeState,
    names: Mapping[str, str],
    rank: int,
    size: int,
    shape: ModelShape,
    common: Mapping[str, Any],
    arrange: Callable[[dict[str, Tensor]], dict[str, Any]],
) -> None:
    """A file of the right size that says which tensors lie where, without their bytes."""
    sections = partial(sections_of, shape_of=lambda other: state.meta(other).shape)
    metas = {here: cut(name, state.meta(name), rank, size, shape.gated, sections(name)) for here, name in names.items()}
    empty = {here: torch.empty(meta.shape, dtype=meta.dtype) for here, meta in metas.items()}  # memory never touched
    with_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # the manifest has better ones
    try:
        with torch.serialization.skip_data():
            torch.save({**common, "model": arrange(empty)}, path)
    finally:
        torch.serialization.set_crc32_options(with_checksums)


def _fill(
    paths: Sequence[Path],
    state: WholeState,
    names: Mapping[str, str],
    shape: ModelShape,
    arrange: Callable[[dict[str, Tensor]], dict[str, Any]],
    on_progress: Callable[[int], None],
) -> None:
    """Write the parameters of one stage into the files of its tensor parallel ranks."""
    before = torch.serialization.get_default_mmap_options() or mmap.MAP_PRIVATE
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    try:
        files = [flatten(safe_torch_load(path, mmap=True)["model"]) for path in paths]
    finally:
        torch.serialization.set_default_mmap_options(before)
    probe = {here: torch.empty(0) for here in names}
    there = {id(tensor): name for name, tensor in flatten(arrange(probe)).items()}
    for here, name in names.items():
        whole = state.read(name)
        sections = sections_of(name, lambda other: state.meta(other).shape)
        for rank, file in enumerate(files):
            file[there[id(probe[here])]].copy_(cut(name, whole, rank, len(files), shape.gated, sections))
        on_progress(whole.numel() * whole.element_size())
