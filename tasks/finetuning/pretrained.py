"""Where finetuning starts: its own checkpoint, or the body of a pretrained BERT."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.utils import unwrap_model
from megatron.training.checkpoint.body import Body, load_body
from megatron.training.checkpoint.find import candidates
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.train_state import TrainState
from megatron.training.utils import print_rank_0


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
        head = unwrap_model(model[0]).head_name
        without = (head, *(() if args.bert_binary_head else ("pooler",)))
        load_body(args, "pretrained_checkpoint", [Body(chunk, without) for chunk in model], head)
        optimizer.reload_model_params()
    else:
        print_rank_0("WARNING: there is no --pretrained-checkpoint; finetuning starts from random weights")
    return TrainState()
