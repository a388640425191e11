"""The common state: one file `common.pt` that the first rank writes and every rank reads."""

from __future__ import annotations

from pathlib import Path

from ..collective import rank_and_size
from ..core import CheckpointingException
from ..durable import FileRecord
from ..mapping import StateDict
from ..safe_load import safe_torch_load
from .base import LoadCommonStrategy, SaveCommonStrategy, StrategyAction, register_default_strategy
from .file_plan import FilePlan, write_together
from .torch_files import pickled

COMMON_STATE_FNAME = "common.pt"


class TorchCommonSaveStrategy(SaveCommonStrategy):
    """Writes `common.pt` as `torch.save` does."""

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> dict[str, FileRecord]:
        return write_together(lambda: self.plan_common(common_state_dict), Path(checkpoint_dir))

    def plan_common(self, common_state_dict: StateDict) -> list[FilePlan]:
        if rank_and_size()[0] != 0:
            return []
        return [FilePlan(COMMON_STATE_FNAME, [pickled(common_state_dict)])]

    def own_files(self, directory: Path) -> list[Path]:
        return [directory / COMMON_STATE_FNAME]


class TorchCommonLoadStrategy(LoadCommonStrategy):
    """Reads `common.pt` without running anything in it."""

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            state = safe_torch_load(path)
        except FileNotFoundError:
            raise CheckpointingException(f"{path} is missing: the checkpoint is incomplete") from None
        if not isinstance(state, dict):
            raise CheckpointingException(f"{path} holds a {type(state).__name__}, expected a state dict")
        return state


register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, TorchCommonSaveStrategy("torch", 1))
register_default_strategy(StrategyAction.LOAD_COMMON, "torch", 1, TorchCommonLoadStrategy())
