"""Where finetuning starts: its own checkpoint, or the body of a pretrained BERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.utils import unwrap_model
from megatron.training.checkpoint.find import candidates, open_candidate
from megatron.training.checkpoint.load import load_run
from megatron.training.train_state import TrainState
from megatron.training.utils import gather_weights, print_rank_0
from tasks.checkpoints import require_same_tokenizer


class Body:
    """A classifier without its head, as what loads checkpoints sees a model chunk."""

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


def load_start(args: Any, model: list[nn.Module], optimizer: Any, scheduler: Any) -> TrainState:
    """Continue the run of `--load` if it has a checkpoint; else start from the weights of `--pretrained-checkpoint`.

    Raises:
        CheckpointingException: the checkpoint is of another model or tokenizer.
    """
    own = args.variant(pretrained_checkpoint=None)
    if args.load and on_first_rank(f"cannot load from {args.load}", lambda: bool(candidates(own))):
        require_same_tokenizer(args, "load")
        return load_run(own, model, optimizer, scheduler)
    if args.pretrained_checkpoint:
        load_body(args, model)
        optimizer.reload_model_params()
    else:
        print_rank_0("WARNING: there is no --pretrained-checkpoint; finetuning starts from random weights")
    return TrainState()


def load_body(args: Any, model: list[nn.Module]) -> None:
    """Take all but the head from `--pretrained-checkpoint`, of any layout."""
    require_same_tokenizer(args, "pretrained_checkpoint")
    without = (unwrap_model(model[0]).head_name, *(() if args.bert_binary_head else ("pooler",)))
    weights = args.variant(finetune=True, ckpt_step=None, auto_detect_ckpt_format=True, pretrained_checkpoint=None)
    weights.load, weights.non_persistent_ckpt_type = args.pretrained_checkpoint, None
    task = f"cannot load from {args.pretrained_checkpoint}"
    kind = on_first_rank(task, lambda: _format(weights))
    gather_weights(model)
    bodies: list[Any] = [Body(chunk, without) for chunk in model]
    load_run(weights, bodies, None, None, strict=kind != "torch")
    print_rank_0(f"  starting from {args.pretrained_checkpoint}; {without[0]} is new")


def _format(args: Any) -> str | None:
    """Of the checkpoint of `--load`; None for a directory of Hugging Face transformers."""
    options = candidates(args)
    return open_candidate(args, options[0]).format if options else None
