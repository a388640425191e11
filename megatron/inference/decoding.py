"""Logits of the next tokens, from whole texts or from what the model has kept of them. b rows, s tokens, v words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.device import current_device
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_model_config, unwrap_model
from megatron.inference.forward_only import run_batches


def can_decode_from_states(model: list[nn.Module]) -> bool:
    """Whether this model, in this layout, can go on from its states: ranks that share a sequence cannot share one
    token."""
    config = get_model_config(model[0])
    shares_tokens = config.sequence_parallel or parallel_state.get_context_parallel_world_size() > 1
    return len(model) == 1 and not shares_tokens and getattr(unwrap_model(model[0]), "decodes_from_states", False)


@dataclass
class _Together:
    """Texts of equal length that are continued in one batch."""

    rows: list[int]
    context: StaticInferenceContext


class StateDecoder:
    """Texts that grow by a token at a time: each of them costs the model one token, the first time all.

    Args:
        vocab_size: tokens of the vocabulary without padding.
        max_length: tokens of a text, at most.
    """

    def __init__(self, model: nn.Module, vocab_size: int, max_length: int) -> None:
        self.model, self.vocab_size, self.max_length = model, vocab_size, max_length
        self.groups: list[_Together] | None = None

    def next_logits(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor | None:
        """[len(rows), vocab_size] logits of the token after each text, on all ranks of the last stage; None elsewhere.

        All ranks of the model take part. Gathers logits over the tensor-parallel group.

        Args:
            texts: each one token longer than in the last call.
            rows: those of them that are continued; no others than in the last call.
        """
        if self.groups is None:
            self.groups = self._groups(texts, rows)
        found: dict[int, Tensor] = {}
        for group in self.groups:
            self._forget_finished(group, rows)
            if group.rows:
                logits = self._step(group, texts)
                found.update(zip(group.rows, logits) if logits is not None else ())
        return torch.stack([found[row] for row in rows]) if found else None

    def _groups(self, texts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[_Together]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            by_length[len(texts[row])].append(row)
        return [_Together(mine, StaticInferenceContext(len(mine), self.max_length)) for mine in by_length.values()]

    def _forget_finished(self, group: _Together, rows: Sequence[int]) -> None:
        places = [i for i, row in enumerate(group.rows) if row in rows]
        if len(places) < len(group.rows):
            group.rows = [group.rows[i] for i in places]
            if places:
                group.context.swap_key_value_dict(places)

    def _step(self, group: _Together, texts: Sequence[Sequence[int]]) -> Tensor | None:
        context, seen = group.context, group.context.sequence_len_offset
        tokens = torch.tensor([list(texts[row][seen:]) for row in group.rows], device=current_device())
        positions = torch.arange(seen, seen + tokens.size(1), device=tokens.device).expand_as(tokens)

        def last(output: Tensor) -> Tensor:
            return gather_from_tensor_model_parallel_region(output[:, -1])[:, : self.vocab_size]

        collected = run_batches(
            [self.model],
            [{"tokens": tokens, "position_ids": positions}],
            lambda chunk, batch: chunk(batch["tokens"], batch["position_ids"], None, inference_context=context),
            lambda output, _: last(output),
            seq_length=tokens.size(1),
            num_sequences=tokens.size(0),
        )
        context.increment_sequence_len_offset(tokens.size(1))
        return collected[0] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
