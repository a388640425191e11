"""A BERT that classifies texts, or chooses among several (Devlin et al., arXiv:1810.04805, section 4).

s sequence, b microbatch, c choices, h hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.bert.replicated_linear import replicated_linear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class BertClassifier(BertModel):
    """Embedding, encoder and pooler of a `BertModel`, with a linear layer on the pooled vector in place of its heads.

    The linear layer is `classification_head`, or with several choices `multichoice_head`, which gives each of them one
    score. Everything else has the names and shapes of a pretrained `BertModel`.

    Args:
        num_classes: kinds of texts; must be 2 or more, and is the number of choices where there are several.
        num_choices: texts of a sample that are scored one by one; 1 to classify a text.
        others: see `BertModel`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        num_classes: int,
        num_choices: int = 1,
        **others: Any,
    ) -> None:
        if num_choices > 1 and num_classes != num_choices:
            raise ValueError(f"num_classes ({num_classes}) must be num_choices ({num_choices}) where there are several")
        self.num_choices, self.num_scores = num_choices, 1 if num_choices > 1 else num_classes
        super().__init__(
            config,
            num_tokentypes,
            transformer_layer_spec,
            vocab_size,
            max_sequence_length,
            add_binary_head=False,
            **others,
        )

    @property
    def head_name(self) -> str:
        """Name of what a pretrained model does not have."""
        return "multichoice_head" if self.num_choices > 1 else "classification_head"

    def _build_heads(self) -> None:
        config = self.config
        self.pooler = Pooler(config.hidden_size, config.init_method, config, config.sequence_parallel)
        self.head_dropout = nn.Dropout(config.hidden_dropout)
        self.add_module(self.head_name, replicated_linear(config.hidden_size, self.num_scores, config))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokentype_ids: Tensor | None = None,
    ) -> Tensor:
        """Scores of the classes or choices, [b, num_classes]; before the last stage the hidden states [s, b·c, h].

        Args:
            input_ids, attention_mask (1 on real tokens), tokentype_ids: [b, s], with several choices [b, c, s].
        """
        flat = [None if part is None else part.flatten(0, -2) for part in (input_ids, attention_mask, tokentype_ids)]
        output = super().forward(flat[0], flat[1], flat[2])  # type: ignore[arg-type]
        assert isinstance(output, Tensor)
        return output

    def _read_out(self, hidden_states: Tensor, attention_mask: Tensor, lm_labels: Tensor | None) -> Tensor:
        head: Any = getattr(self, self.head_name)
        scores = head(self.head_dropout(self.pooler(hidden_states)))  # [b·c, num_scores]
        return scores.view(-1, self.num_choices) if self.num_choices > 1 else scores
