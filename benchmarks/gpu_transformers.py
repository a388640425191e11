"""The same models in Hugging Face's `transformers`, where it is installed: Mixtral, and Bamba for Mamba-2 hybrids.

Bamba rotates half of each head by its position, which the hybrid here does not; else the models have the same parts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def why_not(args: Any) -> str | None:
    """What keeps a model from being measured; None: nothing."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    if args.model_family == "mamba":
        pattern = str(args.hybrid_override_pattern)
        return (
            None if set(pattern[1::2]) == {"-"} else f"Bamba has a feed-forward block after each mixer, not {pattern}"
        )
    return None if args.num_experts else "only mixtures of experts and hybrids are compared with transformers"


def model_of(args: Any) -> nn.Module:
    """With random weights, in fp32, attention by torch's scaled_dot_product_attention."""
    from transformers import BambaConfig, BambaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "max_position_embeddings": args.seq_length,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if args.model_family != "mamba":
        experts = {"num_local_experts": args.num_experts, "num_experts_per_tok": args.moe_router_topk}
        inner, layers = args.moe_ffn_hidden_size, args.num_layers
        return MixtralForCausalLM(MixtralConfig(intermediate_size=inner, num_hidden_layers=layers, **experts, **shape))
    mixers = str(args.hybrid_override_pattern)[::2]
    config = BambaConfig(
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=len(mixers),
        attn_layer_indices=[i for i, symbol in enumerate(mixers) if symbol == "*"],
        mamba_n_heads=2 * args.hidden_size // args.mamba_head_dim,
        mamba_d_head=args.mamba_head_dim,
        mamba_n_groups=args.mamba_num_groups,
        mamba_d_state=args.mamba_state_dim,
        mamba_chunk_size=min(128, args.seq_length),
        **shape,
    )
    return BambaForCausalLM(config)


class Loss(nn.Module):
    """Mean loss of the output layer."""

    def __init__(self, out: nn.Module) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(x).flatten(0, 1).float(), labels.flatten())


class TransformersModel(nn.Module):
    """Mean loss of (ids, labels), [b, s] each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body, self.head = model.model, Loss(model.lm_head)

    def parts_to_compile(self) -> list[nn.Module]:
        """Each layer, and what follows them."""
        return [*self.body.layers, self.head]

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.body(input_ids=ids).last_hidden_state, labels)


def transformers_model(args: Any, device: str) -> TransformersModel:
    """The model, to be trained.

    Raises:
        RuntimeError: it cannot be had.
    """
    missing = why_not(args)
    if missing is not None:
        raise RuntimeError(missing)
    with torch.device(device):
        return TransformersModel(model_of(args)).train()
