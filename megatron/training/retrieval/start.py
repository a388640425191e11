"""Where two encoders start: their own checkpoint, or both from one pretrained BERT."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.collective import on_first_rank
from megatron.core.models.biencoder.biencoder_model import PROJECTION
from megatron.core.utils import unwrap_model
from megatron.training.checkpoint.body import Body, load_body
from megatron.training.checkpoint.find import candidates
from megatron.training.checkpoint.load import load_run
from megatron.training.checkpoint.same_tokenizer import require_same_tokenizer
from megatron.training.checkpointing import load_biencoder_checkpoint
from megatron.training.train_state import TrainState
from megatron.training.utils import gather_weights, print_rank_0


def load_start(args: Any, model: list[nn.Module], optimizer: Any, scheduler: Any) -> TrainState:
    """Continue the run of `--load` if it has a checkpoint; else start from the retriever of
    `--pretrained-checkpoint`, or each encoder from the BERT of `--bert-load`.

    Raises:
        CheckpointingException: the checkpoint is of another model or tokenizer.
    """
    own = args.variant(pretrained_checkpoint=None)
    if args.load and on_first_rank(f"cannot load from {args.load}", lambda: bool(candidates(own))):
        require_same_tokenizer(args, "load")
        return load_run(own, model, optimizer, scheduler)
    if args.pretrained_checkpoint:
        load_biencoder_checkpoint(model, custom_load_path=args.pretrained_checkpoint)
        optimizer.reload_model_params()
    elif args.bert_load:
        gather_weights(model)
        as_bert = args.variant(model_family="bert")
        for embedder in unwrap_model(model[0]).embedders.values():
            load_body(as_bert, "bert_load", [Body(embedder, (PROJECTION,))], PROJECTION)
        optimizer.reload_model_params()
    else:
        print_rank_0("WARNING: there is no --bert-load; retrieval starts from random weights, which learn slowly")
    return TrainState()
