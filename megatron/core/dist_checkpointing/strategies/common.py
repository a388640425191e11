"""The common state: one file `common.pt` that the first rank writes and every rank reads."""

from __future__ import annotations

from pathlib import Path

from ..collective import rank_and_size, together
from ..core import CheckpointingException
from ..mapping import StateDict
from ..safe_load import safe_torch_load
from .base import LoadCommonStrategy, SaveCommonStrategy, StrategyAction, register_default_strategy
from .durable_file import save_torch_file

COMMON_STATE_FNAME = "common.pt"


class TorchCommonSaveStrategy(SaveCommonStrategy):
    """Writes `common.pt` with `torch.save`."""

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        with together(f"cannot write {path}"):
            if rank_and_size()[0] == 0:
                save_torch_file(common_state_dict, path)


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
