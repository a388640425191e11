"""Taking a part of a model, such as a pretrained encoder without its heads, out of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.utils import unwrap_model
from megatron.training.checkpoint.find import candidates, open_candidate
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.utils import gather_weights, print_rank_0


class Body:
    """A model chunk without some of its parts, as what loads checkpoints sees it.

    Args:
        without: how the names begin of the parameters that are left out.
    """

    def __init__(self, chunk: nn.Module, without: tuple[str, ...]) -> None:
        self.chunk, self.without = chunk, without
        self.config = unwrap_model(chunk).config

    def _is_pretrained(self, name: str) -> bool:
        return not name.startswith(self.without)

    def state_dict(self) -> dict[str, Any]:
        """The pretrained parameters."""
        return {
            name: value for name, value in unwrap_model(self.chunk).state_dict().items() if self._is_pretrained(name)
        }

    def sharded_state_dict(self, metadata: Any = None) -> dict[str, Any]:
        """Where each of them stands in the pretrained model."""
        whole: dict[str, Any] = self.chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        return {name: value for name, value in whole.items() if self._is_pretrained(name)}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy them in; what else `state` has, such as the heads of pretraining, is left out.

        Raises:
            CheckpointingException: `state` lacks some.
        """
        own = {name for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        missing = sorted(own - state.keys())
        if missing:
            raise CheckpointingException(f"the pretrained checkpoint lacks {', '.join(missing)}")
        self.chunk.load_state_dict({name: state[name] for name in own}, strict=False)


def load_body(args: Any, load_arg: str, bodies: Sequence[Body], news: str | None = None) -> None:
    """Fill parts of this rank's model from the weights of `load_arg`, of any layout or a Hugging Face directory.

    Args:
        bodies: one for each model chunk; all of them see the whole pretrained model.
        news: what is not in it, to be told to the user.

    Raises:
        CheckpointingException: the checkpoint is of another model or tokenizer.
    """
    require_same_tokenizer(args, load_arg)
    folder = getattr(args, load_arg)
    weights = args.variant(finetune=True, ckpt_step=None, auto_detect_ckpt_format=True, pretrained_checkpoint=None)
    weights.load, weights.non_persistent_ckpt_type = folder, None
    kind = on_first_rank(f"cannot load from {folder}", lambda: _format(weights))
    gather_weights([body.chunk for body in bodies])
    load_run(weights, list(bodies), None, None, strict=kind != "torch")  # type: ignore[arg-type]
    if news is not None:
        print_rank_0(f"  starting from {folder}; {news} is new")


def _format(args: Any) -> str | None:
    """Of the checkpoint of `--load`; None for a directory of Hugging Face transformers."""
    options = candidates(args)
    return open_candidate(args, options[0]).format if options else None
