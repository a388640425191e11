"""Planted mistakes in what BERT and T5 have and GPT has not; see `mutations.py`."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import default_process_groups
from tests.functional_tests.equivalence.mutations import CORE, MANY, Mutation

T5_MODEL = f"{CORE}.models.T5.t5_model:T5Model"
CROSS_ATTENTION = f"{CORE}.transformer.attention:CrossAttention"


def _keys_over_replicas(right: Any) -> Any:
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.linear_kv.tp_group = default_process_groups().dp

    return build


def _cut_off(right: Any) -> Any:
    def unpacked(self: Any, length: int) -> Any:
        hidden_states, encoder_output = right(self, length)
        return hidden_states, encoder_output if hidden_states is None else encoder_output.detach()

    return unpacked


BERT_MUTATIONS = [
    Mutation(
        "gradients of the masked-LM head are those of one part of the sequence",
        f"{CORE}.models.bert.bert_lm_head:replicated_linear",
        lambda right: lambda *args, sees_part_of_sequence, **kwargs: right(*args, **kwargs),
        {"sp": "on"},
        "gradients",
    ),
    Mutation(
        "only the first tensor parallel rank knows the padding",
        f"{CORE}.models.bert.bert_model:BertModel.bert_extended_attention_mask",
        lambda right: lambda self, mask: right(self, mask) & (self.model_comm_pgs.tp.rank() == 0),
        {"tp": MANY, "tokens": "uneven"},
        "loss",
    ),
]

T5_MUTATIONS = [
    Mutation(
        "gradients of relative positions are not summed over the stages",
        f"{T5_MODEL}.weights_of_every_stage",
        lambda right: lambda self: {},
        {"stages": ("2+1", "1+2", "2+2"), "positions": "relative"},
        "gradients",
    ),
    Mutation(
        "gradients of embeddings of both stacks are not summed",
        f"{T5_MODEL}.weights_of_both_stacks",
        lambda right: lambda self: [],
        {"stages": ("1+1", "1+2", "2+1", "2+2"), "output": "untied"},
        "gradients",
    ),
    Mutation(
        "a later stage of the decoder passes back no gradient of the encoder's output",
        f"{T5_MODEL}._unpacked",
        _cut_off,
        {"stages": ("1+2", "2+2")},
        "gradients",
    ),
    Mutation(
        "gradients of keys of cross attention are summed over data instead of tensor parallel ranks",
        f"{CROSS_ATTENTION}.__init__",
        _keys_over_replicas,
        {"tp": MANY, "sp": "off"},
        "gradients",
    ),
]

BY_NAME = {mutation.name: mutation for mutation in (*BERT_MUTATIONS, *T5_MUTATIONS)}

FAST_MISTAKES = (
    "gradients of the masked-LM head are those of one part of the sequence",
    "gradients of relative positions are not summed over the stages",
    "gradients of keys of cross attention are summed over data instead of tensor parallel ranks",
)
"""Those that every test session plants."""
