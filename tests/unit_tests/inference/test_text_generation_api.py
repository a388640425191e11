"""Texts in one call of all ranks: those of the whole model, whatever the layout, with all that can be asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.inference.text_generation import (
    api,
    beam_search_and_post_process,
    generate_and_post_process,
    tokenization,
)
from megatron.inference.text_generation.communication import (
    broadcast_float_list,
    broadcast_from_last_pipeline_stage,
    broadcast_int_list,
    broadcast_tensor,
    copy_from_last_to_first_pipeline_stage,
)
from megatron.inference.text_generation.forward_step import ForwardStep
from megatron.inference.text_generation.generation import score_and_return_on_first_stage
from megatron.inference.text_generation.mcore_engine_server import ModelInferenceWrapperServer, run_mcore_engine
from megatron.inference.text_generation.sampling import sample
from tests.unit_tests.inference.small_models import (
    LLAMA,
    MAX_LENGTH,
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    build_engine,
    build_model,
    greedy_by_hand,
    whole_logits,
)
from tests.worker_pool import run_ranks

PROMPTS, NEW = ["3141592653", "K", "CBA"], 6
LAYOUTS = [(1, 1), (1, 2), pytest.param((2, 1, True), marks=pytest.mark.slow)]


class Letters:
    """A tokenizer of one token a character; one of them can be a newline."""

    eod, bos, newline = -1, 1, -2

    def tokenize(self, text: str) -> list[int]:
        return [self.newline if letter == "\n" else ord(letter) - ord("0") for letter in text]

    def detokenize(self, tokens: list[int]) -> str:
        return "".join("\n" if token == self.newline else chr(token + ord("0")) for token in tokens)


@contextmanager
def tokenizer(letters: Letters) -> Iterator[None]:
    """Of the run."""
    with ExitStack() as stack:
        for module in (api, tokenization):
            stack.enter_context(mock.patch.object(module, "get_tokenizer", lambda: letters))
        yield


def context(rows: int = 3) -> StaticInferenceContext:
    return StaticInferenceContext(rows, MAX_LENGTH)


def on_first(prompts: Any, **others: Any) -> dict[str, Any]:
    """Only rank 0 says what it wants."""
    return {"prompts": prompts, **others} if torch.distributed.get_rank() == 0 else {}


def in_one_call(layout: tuple) -> Any:
    """What the first stage gets of each kind of call; None on the others."""
    letters = Letters()
    with tokenizer(letters):
        model = build_model(*layout, **LLAMA)
        asked = on_first(
            PROMPTS, tokens_to_generate=NEW, top_k_sampling=1, return_output_log_probs=True, return_topk_logprobs=2
        )
        texts = generate_and_post_process(model, context(), **asked)
        scored = generate_and_post_process(model, context(), **on_first(PROMPTS, return_output_log_probs=True))
        beams = beam_search_and_post_process(
            model, **on_first(["3141"], tokens_to_generate=4, beam_size=3, num_return_gen=2, stop_token=49)
        )
        rows = torch.tensor([[3, 1, 4, 1, 5], [7, 2, 0, 0, 0]])
        scores = score_and_return_on_first_stage(model, rows, torch.tensor([5, 2]))
        engine = build_engine(model)
        engine.controller.tokenizer = letters
        config = InferenceWrapperConfig(32, torch.float32, -1, PADDED_VOCAB_SIZE, 4, MAX_LENGTH)
        static = TextGenerationController(ModelInferenceWrapperServer(model, config), letters)
        answers = [
            run_mcore_engine(one, **on_first(PROMPTS, top_k=1, tokens_to_generate=NEW, top_n_logprobs=2, echo=True))
            for one in (engine, StaticInferenceEngine(static))
        ]
        first = parallel_state.is_pipeline_first_stage()
        assert (texts is not None) is (scored is not None) is (beams is not None) is (scores is not None) is first
        return texts, scored, beams, scores, answers


def by_hand() -> Any:
    """(texts, log-probabilities) of the prompts, and a table of those of all tokens behind two rows."""
    model, letters = build_model(**LLAMA), Letters()
    rows = [letters.tokenize(prompt) for prompt in PROMPTS]
    rows = [row + greedy_by_hand(model, row, NEW) for row in rows]
    tables = [whole_logits(model, row).log_softmax(-1) for row in [*rows, [3, 1, 4, 1, 5], [7, 2]]]
    return [letters.detokenize(row) for row in rows], rows, tables


def of_tokens(table: torch.Tensor, row: list[int]) -> list[float]:
    return table[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_call_gives_what_the_whole_model_does(layout: tuple) -> None:
    (expected,) = run_ranks(1, by_hand)
    wanted, rows, tables = expected
    texts, scored, beams, scores, answers = run_ranks(layout[0] * layout[1], in_one_call, layout)[0]
    assert texts[0] == wanted and texts[3] == rows and texts[1] == [list(text) for text in wanted]
    assert scored[0] == PROMPTS and scored[4] is None
    for number, (row, table) in enumerate(zip(rows, tables)):
        known = of_tokens(table, row)
        assert texts[2][number] == pytest.approx(known, abs=1e-4)
        assert scored[2][number] == pytest.approx(known[: len(PROMPTS[number]) - 1], abs=1e-4)
        best = table[:-1].topk(2).values.tolist()
        for answer in answers:
            assert answer["logprobs"][number] == pytest.approx(known, abs=1e-4)
        for own in (texts[4][number], *(answer["top_logprobs"][number] for answer in answers)):
            assert [list(one.values()) for one in own] == [pytest.approx(one, abs=1e-4) for one in best]
    for answer in answers:
        assert (answer["text"], answer["tokens"], answer["segments"]) == (wanted, rows, texts[1])
    tokens, lengths, chosen, likeliest = scores
    for number, table in enumerate(tables[3:]):
        length, row = int(lengths[number]), tokens[number].tolist()
        assert chosen[number, : length - 1].tolist() == pytest.approx(of_tokens(table, row[:length]), abs=1e-4)
        torch.testing.assert_close(likeliest.values[number, :length], table.topk(5).values, atol=1e-4, rtol=0)
    assert len(beams[0]) == 2 and beams[2][0] >= beams[2][1] and all(text.startswith("3141") for text in beams[0])


def best_beams() -> None:
    """Those of all texts of two tokens, as the search is as wide as the vocabulary."""
    model, letters = build_model(**LLAMA), Letters()
    with tokenizer(letters):
        texts, segments, scores = beam_search_and_post_process(
            model, prompts=["31"], tokens_to_generate=2, beam_size=VOCAB_SIZE, num_return_gen=4, stop_token=-1
        )
    after = whole_logits(model, [3, 1]).log_softmax(-1)[-1]
    second = torch.stack([whole_logits(model, [3, 1, token]).log_softmax(-1)[-1] for token in range(VOCAB_SIZE)])
    values, places = ((after[:, None] + second) / 2).flatten().topk(4)
    rows = [[3, 1, place // VOCAB_SIZE, place % VOCAB_SIZE] for place in places.tolist()]
    assert texts == [letters.detokenize(row) for row in rows] and segments == [list(text) for text in texts]
    assert scores == pytest.approx(values.tolist(), abs=1e-4)


def test_beams_are_the_best_texts() -> None:
    run_ranks(1, best_beams)


def settings_and_endings() -> None:
    letters = Letters()
    with tokenizer(letters):
        model = build_model(**LLAMA)
        row = greedy_by_hand(model, [3, 1], NEW)
        letters.newline = row[2]

        def text(**others: Any) -> Any:
            asked = {"prompts": ["31"], "tokens_to_generate": NEW, "top_k_sampling": 1} | others
            found = generate_and_post_process(model, context(), **asked)
            assert found is not None
            return found[3][0][len(asked["prompts"][0]) :]

        assert text() == row and text(stop_on_double_eol=True) == row
        assert text(stop_on_eol=True) == row[: row.index(letters.newline) + 1]
        letters.eod = row[3]
        assert text() == row[: row.index(row[3])]
        assert text(use_eod_token_for_early_termination=False) == row
        letters.eod, letters.newline = -1, row[0]
        colon = Letters.tokenize(letters, "1")
        with mock.patch.object(letters, "tokenize", lambda t: colon if t == ":" else Letters.tokenize(letters, t)):
            assert text(prevent_newline_after_colon=True)[0] != row[0]
        sampled = {"top_k_sampling": 0, "top_p_sampling": 0.9, "temperature": 1.5}
        assert text(random_seed=5, **sampled) == text(random_seed=5, **sampled) != text(random_seed=6, **sampled)
        assert len(text(add_BOS=True)) == NEW + 1
        bad = [
            ({"prompts": [""]}, "at least one token"),
            ({"prompts": None}, "at least one token"),
            ({"tokens_to_generate": 100}, "the context has room"),
            ({"top_p_sampling": 0.5}, "exclude each other"),
        ]
        for others, words in bad:
            with pytest.raises(ValueError, match=words):
                text(**others)
        for others, words in (({"beam_size": 0}, "beam_size is 0"), ({"prompts": PROMPTS}, "one prompt, got 3")):
            with pytest.raises(ValueError, match=words):
                beam_search_and_post_process(model, **({"prompts": ["3"], "beam_size": 2} | others))
        with pytest.raises(NotImplementedError, match="attention_mask"):
            ForwardStep(model, context())(torch.tensor([[3]]), torch.tensor([[0]]), torch.tensor([[True]]))
        dynamic: DynamicInferenceContext = build_engine(model).context  # type: ignore[assignment]
        with pytest.raises(ValueError, match="StaticInferenceContext"):
            generate_and_post_process(model, dynamic, prompts=["3"])


def test_settings_endings_and_refusals() -> None:
    run_ranks(1, settings_and_endings)


def exchange() -> None:
    parallel_state.initialize_model_parallel(1, 2)
    rank = torch.distributed.get_rank()
    assert broadcast_int_list(2, [rank, 7], rank=1).tolist() == [1, 7]
    assert broadcast_float_list(1, [rank + 0.5], data_parallel=True).tolist() == [0.5]
    values = torch.full((2, 3), float(rank))
    assert broadcast_from_last_pipeline_stage([2, 3], torch.float32, values).eq(1).all()
    copy_from_last_to_first_pipeline_stage([2, 3], torch.float32, values)
    assert values.eq(1).all()
    if rank == 0:
        with pytest.raises(ValueError, match=r"\[2\] of torch.int64, not \[3\]"):
            broadcast_tensor([3], torch.int64, torch.tensor([1, 2]))


def test_values_reach_the_ranks_that_want_them() -> None:
    run_ranks(2, exchange)


def test_a_draw_with_torchs_own_stream() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 9.0], [5.0, 0.0, 0.0, 9.0]])
    assert sample(logits, top_k=1).tolist() == [3, 3] and sample(logits, top_k=1, vocab_size=3).tolist() == [1, 0]
    torch.manual_seed(3)
    first = [sample(logits, top_p=0.99, temperature=3.0, vocab_size=3).tolist() for _ in range(5)]
    torch.manual_seed(3)
    assert first == [sample(logits, top_p=0.99, temperature=3.0, vocab_size=3).tolist() for _ in range(5)]
    with pytest.raises(ValueError, match="exclude each other"):
        sample(logits, top_k=2, top_p=0.5)
