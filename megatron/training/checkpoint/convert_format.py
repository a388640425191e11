"""`--ckpt-convert-format`: write the state that a run has loaded in another format, instead of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from megatron.training.checkpoint.context import CheckpointContext
from megatron.training.checkpoint.save import save_run
from megatron.training.settings import Settings
from megatron.training.train_state import TrainState
from megatron.training.utils import print_rank_0


class KeptPosition:
    """Stands for the data iterator, of which a conversion knows the position alone."""

    def __init__(self, position: Any) -> None:
        self.position = position

    def state_dict(self) -> Any:
        """What was loaded."""
        return self.position

    def load_state_dict(self, position: Any) -> None:
        """Take another one."""
        self.position = position


def convert_format(
    args: Settings, state: TrainState, model: list[nn.Module], optimizer: Any | None, scheduler: Any | None
) -> Path:
    """Save everything to `--ckpt-convert-save`/FORMAT; that folder. All ranks call this."""
    folder = Path(args.ckpt_convert_save) / args.ckpt_convert_format
    changed = args.variant(
        save=str(folder),
        ckpt_format=args.ckpt_convert_format,
        use_dist_ckpt=args.ckpt_convert_format != "torch",
        async_save=None,
        save_keep_last=None,
        save_retain_interval=None,
    )
    position = None if state.data_position is None else KeptPosition(state.data_position)
    save_run(changed, state, model, optimizer, scheduler, CheckpointContext(), data_iterator=position)
    print_rank_0(f"> converted checkpoint: {args.load} -> {folder}.")
    return folder
