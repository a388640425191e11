"""Running a model with a context, under tensor and pipeline parallelism. b rows, s tokens of a pass, v vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import parallel_state
from megatron.core.inference.contexts import (
    BaseInferenceContext,
    DynamicInferenceContext,
    EncoderDecoderContext,
    StaticInferenceContext,
)
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection, has_default_process_groups
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config, get_pg_size, unwrap_model

Inputs = dict[str, Any]


class AbstractModelInferenceWrapper(ABC):
    """A model that is only run forward. All ranks of the model call its methods with equal arguments.

    Args:
        model: this rank's model, or the list of its virtual pipeline chunks, with or without wrappers for training.
        inference_context: without one, a static context of the configuration's size.
        model_comm_pgs: groups of the model; None are the default ones.

    Raises:
        ValueError: the model is cut over context parallel ranks.
    """

    takes_whole_rows = False
    """A pass is over all tokens so far, because nothing is kept of those before."""

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        inference_wrapper_config: InferenceWrapperConfig,
        inference_context: BaseInferenceContext | None = None,
        model_comm_pgs: ProcessGroupCollection | None = None,
    ) -> None:
        self.chunks = [model] if isinstance(model, nn.Module) else list(model)
        self.model = self.chunks[0]
        self.config = get_model_config(self.model)
        if self.config.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size is {self.config.context_parallel_size}: generate with 1; a checkpoint loads "
                "into any layout"
            )
        self.inference_wrapper_config = inference_wrapper_config
        self.inference_context = inference_context or StaticInferenceContext.from_config(inference_wrapper_config)
        self.num_stages = self.config.pipeline_model_parallel_size
        self.tp_group = None if model_comm_pgs is None else model_comm_pgs.tp
        if model_comm_pgs is not None:
            self.num_stages = get_pg_size(model_comm_pgs.pp)
        elif has_default_process_groups():  # the stacks of a T5 each count their own stages
            self.num_stages = get_pg_size(parallel_state.get_pipeline_model_parallel_group())
        self.token_multiple = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        true_size = get_attr_wrapped_model(self.chunks[-1], "true_vocab_size", allow_none=True)
        self.vocab_size: int = true_size or inference_wrapper_config.padded_vocab_size

    @property
    def inference_params(self) -> BaseInferenceContext:
        """The former name of the context."""
        return self.inference_context

    def prep_model_for_inference(self, prompts_tokens: Tensor | None = None) -> None:
        """Nothing is dropped out from now on, and the context is empty."""
        for chunk in self.chunks:
            chunk.eval()
        self.inference_context.reset()  # type: ignore[attr-defined]

    @abstractmethod
    def prep_inference_input(self, prompt_tokens: Tensor) -> Inputs:
        """What the passes over a batch [b, l] of prompts are cut from."""

    @abstractmethod
    def get_batch_for_context_window(
        self, inference_input: Inputs, context_start_position: int, context_end_position: int
    ) -> Inputs:
        """The input of one pass, over the tokens from start to end - 1 of each row."""

    def inputs_of(self, context: DynamicInferenceContext | EncoderDecoderContext) -> Inputs:
        """What the pass that `context` has planned needs."""
        return {
            "tokens": context.current_input_ids(),
            "position_ids": context.current_position_ids(),
            "output_positions": context.output_positions(),
        }

    @abstractmethod
    def compute(self, chunk: nn.Module, inputs: Inputs) -> Tensor:
        """What one model chunk makes of the input of a pass: logits, or hidden states before the last stage."""

    @torch.no_grad()
    def run_one_forward_step(self, inference_input: Inputs, recv_buffer_seq_len: int | None = None) -> Tensor | None:
        """Logits [b, s, v] on all tensor parallel ranks of the last stage, without columns of padding; None elsewhere.

        Communicates: whatever the layers do; activations between stages; an all-gather of the logits over the tensor
        parallel group.
        """
        tokens: Tensor = inference_input["tokens"]
        batch_size, length = tokens.shape[:2]
        limit = self.inference_wrapper_config.inference_batch_times_seqlen_threshold
        is_static = self.inference_context.is_static_batching()
        if self.num_stages == 1:
            return self.forward_pass_without_pipeline_parallel(inference_input)
        if is_static and 0 <= limit < batch_size * length:
            return self.forward_pass_with_pipeline_parallel_large_input_batch(inference_input, recv_buffer_seq_len)
        return self.forward_pass_with_pipeline_parallel_small_input_batch(inference_input, recv_buffer_seq_len)

    @torch.no_grad()
    def forward_pass_without_pipeline_parallel(self, inference_input: Inputs) -> Tensor:
        """Logits [b, s, v] of a model that this rank, with its tensor parallel peers, holds whole."""
        return self._whole_logits(self.compute(self.model, inference_input))

    def forward_pass_with_pipeline_parallel_small_input_batch(
        self, inference_input: Inputs, recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        """The batch goes through the stages in one piece."""
        return self._through_pipeline([inference_input], inference_input["tokens"].size(0))

    def forward_pass_with_pipeline_parallel_large_input_batch(
        self, inference_input: Inputs, recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        """The rows go through the stages in pieces, so that these work at the same time."""
        batch_size, length = inference_input["tokens"].shape[:2]
        limit = self.inference_wrapper_config.inference_batch_times_seqlen_threshold
        size = max(1, limit // length)
        whole = batch_size - batch_size % size
        outputs = []
        for begin, end, step in ((0, whole, size), (whole, batch_size, batch_size - whole)):
            if end > begin:
                starts = range(begin, end, step)
                pieces = [_rows(inference_input, start, start + step) | {"first_row": start} for start in starts]
                outputs.append(self._through_pipeline(pieces, step))
        self.inference_context.reset_batch_size_offset()
        return _joined([output for output in outputs if output is not None], inference_input)

    @torch.no_grad()
    def _through_pipeline(self, pieces: list[Inputs], num_rows: int) -> Tensor | None:
        """Logits of all pieces, of `num_rows` rows each, on the last stage."""

        def forward_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
            inputs = next(iterator)
            if "first_row" in inputs:
                self.inference_context.reset_batch_size_offset()
                self.inference_context.increment_batch_size_offset(inputs["first_row"])
            return self.compute(chunk, inputs), lambda output, non_loss_data=True: self._whole_logits(output)

        iterators = [iter(pieces) for _ in self.chunks]
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.model,
            num_microbatches=len(pieces),
            micro_batch_size=num_rows,
            **self.lengths_of_pass(pieces[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )
        return _joined(collected, pieces[0])

    def lengths_of_pass(self, inputs: Inputs) -> dict[str, int]:
        """What a pipeline's schedule must know of the rows that go through it."""
        return {"seq_length": inputs["tokens"].size(1)}

    def _whole_logits(self, logits: Tensor) -> Tensor:
        """[b, s, v] of this rank's part of the vocabulary."""
        parallel = getattr(unwrap_model(self.chunks[-1]), "parallel_output", False)
        whole = gather_from_tensor_model_parallel_region(logits, self.tp_group) if parallel else logits
        return whole[..., : self.vocab_size]


def _joined(outputs: list[Tensor], inputs: Inputs) -> Tensor | None:
    """Logits of all pieces: rows below each other, or chosen positions in a row; None before the last stage."""
    return torch.cat(outputs, dim=1 if "output_positions" in inputs else 0) if outputs else None


def _rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows start, ..., stop - 1 of each tensor."""
    return {name: value[start:stop] if isinstance(value, Tensor) else value for name, value in inputs.items()}
