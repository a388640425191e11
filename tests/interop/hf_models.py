"""Small random models of transformers, one for each thing in which families differ, and ours beside them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCAB, LENGTH, BASE = 4, 64, 8, 4, 96, 101, 48, 5000.0
BATCH = 2

_LLAMA = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BERT = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
}
_GPT2 = {
    "n_layer": LAYERS,
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_ORIGINAL = "original_max_position_embeddings"


def _rope(kind: str, factor: float, **others: float) -> dict[str, Any]:
    return {**_LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": BASE, "factor": factor, **others}}


_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (beginning of their classes' names, settings)
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _LLAMA),
    "llama-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-biased": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": HEADS}),
    "llama3": ("Llama", _rope("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, **{_ORIGINAL: 8192})),
    "llama-linear": ("Llama", _rope("linear", 2.0)),
    "llama-yarn": ("Llama", _rope("yarn", 4.0, beta_fast=8.0, beta_slow=1.0, **{_ORIGINAL: 32})),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen2-window": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True, **_WINDOW}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "bert": ("Bert", _BERT),
    "megatron-bert": ("MegatronBert", _BERT),
}


def is_bert(case: str) -> bool:
    """Whether it is trained by pretrain_bert.py."""
    return case.endswith("bert")


def make(case: str, directory: Path) -> Any:
    """A random model, saved to `directory`."""
    torch.manual_seed(0)
    family, settings = CASES[case]
    head = "ForPreTraining" if is_bert(case) else "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    model.save_pretrained(directory)
    return model


def inputs(case: str) -> dict[str, Tensor]:
    """A batch for either side."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if not is_bert(case):
        return {"input_ids": ids}
    real = (torch.arange(LENGTH)[None] < torch.tensor([LENGTH, 20])[:, None]).long()
    types = (torch.arange(LENGTH)[None] >= 9).long().expand_as(ids).contiguous()
    return {"input_ids": ids, "attention_mask": real, "token_type_ids": types}


def their_scores(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits; of a BERT those of its tokens that are none of padding, and the scores of the order."""
    with torch.no_grad():
        output = model(**batch)
    if "attention_mask" not in batch:
        return [output.logits]
    return [output.prediction_logits[batch["attention_mask"] > 0], output.seq_relationship_logits]


# --- ours -----------------------------------------------------------------------------------------------


def start(flags: list[str], case: str) -> list[nn.Module]:
    """This rank's model as a program with these flags builds and loads it."""
    import pretrain_bert
    import pretrain_gpt
    from megatron.training import get_args, get_model, initialize_megatron
    from megatron.training.checkpoint.load import load_run

    program = pretrain_bert if is_bert(case) else pretrain_gpt
    family = {"model_family": "bert"} if is_bert(case) else {}
    common = ["--micro-batch-size", "1", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1)]
    before, sys.argv = sys.argv, ["test", *common, "--attention-dropout", "0", "--hidden-dropout", "0", *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            initialize_megatron(args_defaults=family)
            model = get_model(program.model_provider, wrap_with_ddp=False)
            load_run(get_args(), model, None, None)
    finally:
        sys.argv = before
    for chunk in model:
        chunk.eval()
    return model


def our_scores(model: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor] | None:
    """What `their_scores` gives, on the last stage; None elsewhere."""
    ids, real = batch["input_ids"], batch.get("attention_mask")
    positions = torch.arange(ids.size(1)).expand_as(ids)

    def pick(output: Any, non_loss_data: bool = True) -> list[Tensor]:
        logits, order = (output, None) if real is None else output
        logits = gather_from_tensor_model_parallel_region(logits)[..., :VOCAB]
        return [logits] if real is None else [logits[real > 0], order]

    def forward_step(data_iterator: object, chunk: nn.Module) -> tuple[Any, Any]:
        if real is None:
            return chunk(ids, positions, None), pick
        return chunk(ids, real, tokentype_ids=batch["token_type_ids"]), pick

    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(model) if len(model) > 1 else None,
            model=model,
            num_microbatches=1,
            seq_length=ids.size(1),
            micro_batch_size=ids.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected[0] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
