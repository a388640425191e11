"""Texts after prompts with images, from a small model with LLaVAModel's interface: those of whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest, VLMInferenceRequest
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.model_inference_wrappers.multimodal.vlm_inference_wrapper import VLMInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.vlm_text_generation_controller import (
    VLMTextGenerationController,
)
from tests.unit_tests.inference.small_models import (
    LLAMA,
    MAX_LENGTH,
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    Words,
    build_engine,
    build_model,
)
from tests.worker_pool import run_ranks

IMAGE, PER_TILE, WIDTH, NEW = -200, 3, 5, 7
PROMPTS = ["3 1 -200 4 1", "-200 7 2 9 8"]
TILES = [2, 2]
GREEDY = SamplingParams(top_k=1, num_tokens_to_generate=NEW, return_log_probs=True)


class Reader(nn.Module):
    """A GPT, before which a projection makes `PER_TILE` embeddings of each tile [WIDTH]."""

    image_token_index = IMAGE

    def __init__(self) -> None:
        super().__init__()
        self.gpt = build_model(**LLAMA)
        self.config, self.true_vocab_size, self.parallel_output = self.gpt.config, VOCAB_SIZE, self.gpt.parallel_output
        self.projection = nn.Linear(WIDTH, PER_TILE * self.config.hidden_size)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        inference_context: Any = None,
        num_image_tiles: list[int] | None = None,
        image_token_index: int | None = None,
    ) -> Tensor:
        if inference_context is not None and inference_context.sequence_len_offset:
            return self.gpt(input_ids, position_ids, None, inference_context=inference_context)
        tiles = iter(self.projection(images).view(len(images), PER_TILE, -1).split(num_image_tiles or []))
        words = self.gpt.embedding(input_ids.clamp(min=0), position_ids).transpose(0, 1)  # [b, s, h]
        rows = []
        for ids, own in zip(input_ids.tolist(), words):
            pairs = zip(ids, own[:, None])
            parts = [next(tiles).flatten(0, 1) if token == IMAGE else word for token, word in pairs]
            rows.append(torch.cat(parts))
        together = torch.stack(rows, dim=1)  # [c, b, h]
        positions = torch.arange(together.size(0)).expand(together.size(1), -1)
        return self.gpt(None, positions, None, decoder_input=together, inference_context=inference_context)


def requests(images: Tensor) -> list[InferenceRequest]:
    return [
        VLMInferenceRequest(
            request_id=str(row),
            prompt=prompt,
            sampling_params=GREEDY,
            num_img_embeddings_per_tile=PER_TILE,
            imgs=images[2 * row : 2 * row + 2],
            num_tiles=torch.tensor([TILES[row]]),
            decoder_seq_length=20,
        )
        for row, prompt in enumerate(PROMPTS)
    ]


def engine_of(model: Reader) -> StaticInferenceEngine:
    config = InferenceWrapperConfig(32, torch.float32, -1, PADDED_VOCAB_SIZE, 2, MAX_LENGTH)
    return StaticInferenceEngine(VLMTextGenerationController(VLMInferenceWrapper(model, config), Words()))


@torch.no_grad()
def by_hand(model: Reader, prompt: str, images: Tensor) -> tuple[list[int], list[float]]:
    """(tokens, their log-probabilities) of whole passes without any memory."""
    text, values = Words().tokenize(prompt), []
    for _ in range(NEW):
        positions = torch.arange(len(text))[None]
        logits = model(images, torch.tensor([text]), positions, None, num_image_tiles=[len(images)])
        value, token = logits[0, -1, :VOCAB_SIZE].log_softmax(-1).max(-1)
        text.append(int(token))
        values.append(float(value))
    return text[-NEW:], values


def reads_images() -> None:
    torch.manual_seed(1)
    model, images = Reader().eval(), 3 * torch.randn(4, WIDTH)
    found = engine_of(model).generate(inference_requests=requests(images))
    for row, request in enumerate(found):
        tokens, values = by_hand(model, PROMPTS[row], images[2 * row : 2 * row + 2])
        assert request.generated_tokens.tolist() == tokens
        assert request.generated_log_probs.tolist() == pytest.approx(values, abs=1e-4)
        assert len(request.prompt_log_probs) == 4
    other = engine_of(model).generate(inference_requests=requests(images.flip(0)))
    assert [request.generated_tokens.tolist() for request in other] != [r.generated_tokens.tolist() for r in found]


def test_texts_after_images_are_those_of_whole_passes() -> None:
    run_ranks(1, reads_images)


def refuses() -> None:
    model, images = Reader().eval(), torch.randn(4, WIDTH)
    plain = InferenceRequest(request_id="2", prompt="1 2 3", sampling_params=GREEDY)
    long, fewer, short = (requests(images)[0] for _ in range(3))
    long.decoder_seq_length = 9
    fewer.imgs = images[:1]
    short.prompt = "1 -200"
    for some, words in (
        ([plain], "VLMInferenceRequest"),
        ([long], r"rows of \[10\]"),
        ([fewer], "2 tiles, 1 tiles"),
        ([short, requests(images)[1]], r"equal length, got \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=words):
            engine_of(model).generate(inference_requests=some)
    context = build_engine(model.gpt).context
    with pytest.raises(ValueError, match="StaticInferenceContext"):
        VLMInferenceWrapper(model, InferenceWrapperConfig(32, torch.float32, -1, PADDED_VOCAB_SIZE), context)
    wrapper = VLMInferenceWrapper(
        model, InferenceWrapperConfig(32, torch.float32, -1, PADDED_VOCAB_SIZE), StaticInferenceContext(1, 30)
    )
    inputs = wrapper.prep_inference_input(torch.tensor([[3, IMAGE, 4]]), PER_TILE, images[:2], torch.tensor([2]), 20)
    cut = wrapper.get_batch_for_context_window(inputs, 0, 2)
    assert cut["tokens"].tolist() == [[3, IMAGE]] and inputs["ends"].tolist() == [[0, 6, 7]]


def test_what_does_not_fit_together_is_refused() -> None:
    run_ranks(1, refuses)
