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
BATCH, DECODER_LENGTH = 2, 24

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
_T5 = {
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS - 2,
    "d_model": HIDDEN,
    "d_kv": 12,
    "d_ff": FFN,
    "num_heads": HEADS,
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "relative_attention_max_distance": 30,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
_ORIGINAL = "original_max_position_embeddings"


def _rope(kind: str, factor: float, **others: float) -> dict[str, Any]:
    return {**_LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": BASE, "factor": factor, **others}}


_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
_EXPERTS = {**_LLAMA, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48}
_LATENT = {
    **{name: value for name, value in _LLAMA.items() if name != "rope_parameters"},
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
}
_STRETCHED = {"rope_type": "yarn", "rope_theta": BASE, "factor": 4.0, _ORIGINAL: 16}
_V2 = {**_LATENT, "q_lora_rank": None, "rope_parameters": {**_STRETCHED, "mscale": 0.707, "mscale_all_dim": 0.707}}
_V2 |= {"n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "topk_method": "greedy"}
_V3 = {**_LATENT, "q_lora_rank": 32, "rope_parameters": {**_STRETCHED, "mscale": 1.0, "mscale_all_dim": 1.0}}
_V3 |= {"n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2}
_V3 |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_mtp_layers": 0}
_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3, "routed_scaling_factor": 16.0}

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
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3-moe-softmax-first": ("Qwen3Moe", {**_EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            **_EXPERTS,
            "head_dim": 8,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [2],
        },
    ),
    "deepseek-v2-moe": ("DeepseekV2", _V2),
    "deepseek-v2-moe-groups": (
        "DeepseekV2",
        {**_V2, **_GROUPS, "q_lora_rank": 32, "rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
    ),
    "deepseek-v3-moe": ("DeepseekV3", _V3),
    "bert": ("Bert", _BERT),
    "megatron-bert": ("MegatronBert", _BERT),
    "t5": ("T5", _T5),
}
_HEADS = {"Bert": "ForPreTraining", "MegatronBert": "ForPreTraining", "GPT2": "LMHeadModel"}
_HEADS["T5"] = "ForConditionalGeneration"


SWEPT = ("deepseek-v2-moe", "deepseek-v2-moe-groups", "qwen3-moe-softmax-first")
"""Cases that the fast tests see on one process only, because others like them go through layouts and conversions."""
WITH_EXPERTS = [case for case in CASES if "mixtral" in case or "moe" in case]


def closeness(case: str) -> dict[str, float]:
    """How equal scores are. A T5 does not scale those of its attention: a sharper softmax, which passes on rounding."""
    return {"rtol": 1e-5, "atol": 1e-4 if case == "t5" else 2e-5}


def is_bert(case: str) -> bool:
    """Whether it is trained by pretrain_bert.py."""
    return case.endswith("bert")


def family_of(case: str) -> str:
    """Which program trains it: gpt, bert or t5."""
    return "bert" if is_bert(case) else case if case == "t5" else "gpt"


def make(case: str, directory: Path) -> Any:
    """A random model, saved to `directory`."""
    torch.manual_seed(0)
    family, settings = CASES[case]
    head = _HEADS.get(family, "ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    if case == "t5":  # made with the embedding as output weight, which version 1.1 has not
        model.lm_head.weight = nn.Parameter(HIDDEN**-0.5 * torch.randn(VOCAB, HIDDEN))
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn(buffer.shape))
    model.save_pretrained(directory)
    return model


def inputs(case: str) -> dict[str, Tensor]:
    """A batch for either side."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if case == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :DECODER_LENGTH].flip(0)}
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
    from importlib import import_module

    from megatron.training import get_args, get_model, initialize_megatron
    from megatron.training.checkpoint.load import load_run

    program = import_module(f"pretrain_{family_of(case)}")
    family = {} if family_of(case) == "gpt" else {"model_family": family_of(case)}
    if case == "t5":
        flags = [*flags, "--decoder-seq-length", str(DECODER_LENGTH)]
        flags += ["--pipeline-model-parallel-split-rank", "1"] if "--pipeline-model-parallel-size" in flags else []
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
        if "decoder_input_ids" in batch:
            return chunk(ids, batch["decoder_input_ids"], None, None, None), pick
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
            decoder_seq_length=DECODER_LENGTH if "decoder_input_ids" in batch else None,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return collected[0] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
