"""Running a model that reads images among the words: in place of each image's token stand the embeddings of its tiles.

b rows, s tokens of a pass, c the same with images, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import Inputs
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.utils import get_attr_wrapped_model, unwrap_model


class VLMInferenceWrapper(GPTInferenceWrapper):
    """Of a model with LLaVAModel's interface: called with images, tokens, positions, mask, and by name the context,
    the number of each image's tiles and the image token; it gives logits [b, c, v] of a pass over prompts, and
    [b, s, v] of later ones, at which it does not look at the images again. Its attribute `image_token_index` is the
    token.

    The first pass is over whole prompts, of equal length with equally many embeddings.

    Raises:
        ValueError: the context is not static.
        NotImplementedError: tokens are shared out over tensor parallel ranks.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        inference_wrapper_config: InferenceWrapperConfig,
        inference_context: BaseInferenceContext | None = None,
    ) -> None:
        super().__init__(model, inference_wrapper_config, inference_context)
        if not self.inference_context.is_static_batching():
            raise ValueError("images are read with a StaticInferenceContext, whose rows are all at one position")
        if self.token_multiple > 1:
            raise NotImplementedError("sequence_parallel: the embeddings of images are not cut; generate without it")
        self.image_token: int = get_attr_wrapped_model(self.chunks[0], "image_token_index")
        self.num_added = 0
        """Embeddings of a row's images, less the tokens that they stand for."""

    def prep_model_for_inference(self, prompts_tokens: Tensor | None = None) -> None:
        """Nothing is dropped out from now on, the context is empty, and no image has been read."""
        super().prep_model_for_inference(prompts_tokens)
        self.num_added = 0

    def prep_inference_input(  # type: ignore[override]
        self,
        prompts_tokens: Tensor,
        num_img_embeddings_per_tile: int,
        images: Tensor,
        num_tiles: Tensor,
        decoder_seq_length: int,
    ) -> Inputs:
        """`tokens` and `position_ids` [b, s], `images`, `num_tiles`, and `ends` [b, s]: where the last embedding of
        each token stands among all of its row.

        Args:
            num_img_embeddings_per_tile: a tile's.
            images: [tiles of all images, ...], in the order of the rows.
            num_tiles: of each image.
            decoder_seq_length: what a row may have of tokens and embeddings.

        Raises:
            ValueError: images and their tokens are not equally many, rows differ in their embeddings, or have too many.
        """
        is_image = prompts_tokens == self.image_token
        if int(is_image.sum()) != len(num_tiles) or int(num_tiles.sum()) != len(images):
            raise ValueError(
                f"{int(is_image.sum())} image tokens, {len(num_tiles)} images of {int(num_tiles.sum())} tiles, "
                f"{len(images)} tiles: they must be the same images"
            )
        widths = torch.ones_like(prompts_tokens)
        widths[is_image] = num_img_embeddings_per_tile * num_tiles.to(widths)
        ends = widths.cumsum(1) - 1
        lengths = ends[:, -1] + 1
        if len(set(lengths.tolist())) > 1 or int(lengths[0]) > decoder_seq_length:
            raise ValueError(
                f"rows of {lengths.tolist()} tokens and embeddings: they must be equally long, at most "
                f"{decoder_seq_length}"
            )
        extra = {"images": images, "num_tiles": num_tiles, "ends": ends}
        return super().prep_inference_input(prompts_tokens) | extra

    def get_batch_for_context_window(
        self, inference_input: Inputs, context_start_position: int, context_end_position: int
    ) -> Inputs:
        """Columns start, ..., end - 1 of tokens and positions, and the images."""
        window = slice(context_start_position, context_end_position)
        cut = {name: inference_input[name][:, window] for name in ("tokens", "position_ids", "ends")}
        return inference_input | cut

    def run_one_forward_step(self, inference_input: Inputs, recv_buffer_seq_len: int | None = None) -> Tensor | None:
        """As of a GPT; the first one leaves the context where the images' embeddings end, but for the tokens.

        Raises:
            ValueError: the first pass is not over whole prompts.
        """
        inputs = inference_input
        if self.inference_context.sequence_len_offset:  # type: ignore[attr-defined]
            moved = {"position_ids": inputs["position_ids"] + self.num_added, "ends": None}
            return self._through(inputs | moved)
        if inputs["ends"].size(1) != inputs["tokens"].size(1):
            raise ValueError("prompts with images are of equal length: the first pass is over all of their tokens")
        logits = self._through(inputs)
        self.num_added = int(inputs["ends"][0, -1]) + 1 - inputs["tokens"].size(1)
        self.inference_context.increment_sequence_len_offset(self.num_added)
        return logits

    def _through(self, inputs: Inputs) -> Tensor | None:
        if self.num_stages == 1:
            return self.forward_pass_without_pipeline_parallel(inputs)
        return self.forward_pass_with_pipeline_parallel_small_input_batch(inputs)

    def lengths_of_pass(self, inputs: Inputs) -> dict[str, int]:
        """c of a row."""
        ends = inputs["ends"]
        return {"seq_length": inputs["tokens"].size(1) if ends is None else int(ends[0, -1]) + 1}

    def compute(self, chunk: nn.Module, inputs: Inputs) -> Tensor:
        """Logits [1, n, v] at the last embedding of each wanted token."""
        output: Tensor = chunk(
            inputs["images"],
            inputs["tokens"],
            inputs["position_ids"],
            None,
            inference_context=self.inference_context,
            num_image_tiles=inputs["num_tiles"].tolist(),
            image_token_index=self.image_token,
        )
        if not getattr(unwrap_model(chunk), "post_process", True):
            return output
        ends, wanted = inputs["ends"], inputs["output_positions"]
        if ends is not None:
            rows = torch.arange(len(ends), device=output.device)[:, None]
            output = output[rows, ends.to(output.device)]
        return output[wanted].unsqueeze(0)
