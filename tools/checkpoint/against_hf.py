"""Run a checkpoint's model beside the one of a directory of transformers, on one process in fp32."""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.export import Family, HFFolder, load_whole_state
from megatron.core.export.whole_state import OF_VOCABULARY, Cast
from megatron.training import get_model, initialize_megatron
from megatron.training.arguments import parse_args
from megatron.training.checkpoint.arguments import apply_checkpoint_args
from megatron.training.checkpoint.conversion import Source, load_hf, load_own
from megatron.training.checkpoint.hf_settings import hf_directory
from megatron.training.rules.hybrid import SPEC
from megatron.training.settings import Source as Origin

BATCH, LENGTH = 2, 64


def compare_with_hf(checkpoint: str, directory: Path) -> tuple[float, str]:
    """(largest difference of what both compute, what that is) on random tokens.

    Raises:
        CheckpointingException: the package transformers is missing, or the two are not of the same kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointingException("--against-hf runs the package transformers: pip install transformers") from error
    folder = HFFolder(directory)
    family = folder.family.our_type
    hf = hf_directory(checkpoint)
    source = load_own(checkpoint, family) if hf is None else load_hf(hf, family)
    words = int(folder.config["vocab_size"])
    length = length_for(source)
    ids = torch.randint(0, words, (BATCH, length), generator=torch.Generator().manual_seed(1))
    name = (folder.config.get("architectures") or [folder.family.architecture])[0]
    theirs = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        output = theirs.eval()(ids, decoder_input_ids=ids.flip(0)) if family == "t5" else theirs.eval()(ids)
    expected, what = _scores(output)
    del theirs
    found = our_scores(source, ids, folder.family, words, what)
    if found.shape != expected.shape:
        raise CheckpointingException(f"{what} have shapes {list(found.shape)} and {list(expected.shape)}")
    return (found - expected).abs().max().item(), what


def length_for(source: Source) -> int:
    """Tokens of a sample that the model can take."""
    return min(LENGTH, source.settings.get("max_position_embeddings") or LENGTH)


def _scores(output: Any) -> tuple[Tensor, str]:
    """What transformers' model says, and what that is."""
    for name in ("logits", "prediction_logits"):
        if name in output:
            return output[name], "logits"
    return output["last_hidden_state"], "hidden states"


def our_scores(source: Source, ids: Tensor, theirs: Family, words: int, what: str) -> Tensor:
    """The same of our model."""
    family = theirs.our_type
    with contextlib.redirect_stdout(io.StringIO()):
        model = build(source, family, words)
    load_whole_state(model, Cast(source.state, torch.float32), theirs.optional if what != "logits" else ())
    hidden: list[Tensor] = []
    block = model.encoder if family == "bert" else model.decoder
    block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.no_grad():
        if family == "t5":
            logits = model(ids, ids.flip(0), None, None, None)
        elif family == "bert":
            types = torch.zeros_like(ids) if source.settings["bert_binary_head"] else None
            logits, _ = model(ids, torch.ones_like(ids), tokentype_ids=types)
        else:
            logits = model(ids, torch.arange(ids.size(1)).expand_as(ids), None)
    scores = logits[..., :words] if what == "logits" else hidden[0].transpose(0, 1)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return scores


def build(source: Source, family: str, words: int) -> Any:
    """An empty model of the source's settings, on this process."""
    flags = "--micro-batch-size 1 --tokenizer-type NullTokenizer --attention-dropout 0 --hidden-dropout 0"
    if family == "t5":
        length = length_for(source)
        flags += f" --decoder-seq-length {length} --seq-length {length} --max-position-embeddings {length}"
    args = parse_args(argv=[*flags.split(), "--vocab-size", str(words - 1)])
    apply_checkpoint_args(args, source.settings)
    rows = source.state.meta(OF_VOCABULARY[0]).size(0)
    own = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "ckpt_format": "torch_dist"}
    own |= {"padded_vocab_size": rows}
    own |= {"bert_binary_head": bool(source.settings.get("bert_binary_head"))} if family == "bert" else {}
    for name, value in own.items():
        args.put(name, value, Origin("program"))
    program = import_module(f"pretrain_{family}")
    if family == "mamba":
        args.put("spec", SPEC.split(), Origin("program"))
    initialize_megatron(parsed_args=args, args_defaults={"model_family": family} if family != "gpt" else {})
    return get_model(program.model_provider, wrap_with_ddp=False)[0].eval()
