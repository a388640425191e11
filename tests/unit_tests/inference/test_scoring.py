"""Scores of texts: equal to a plain computation of one text at a time, under every layout and batch size."""

from __future__ import annotations

import pytest
import torch

from megatron.core import parallel_state
from megatron.inference.forward_only import shares
from megatron.inference.scoring import Score, ScoredText, rows_of, score
from tests.unit_tests.inference.test_text_generation import VOCAB_SIZE, build_model
from tests.worker_pool import run_ranks

LAYOUTS = {
    "dp2": (2, ()),
    "tp2-sp": (2, (2, 1, True)),
    "pp2": (2, (1, 2)),
    "cp2": (2, (1, 1, False, 2)),
    "tp2-pp2": (4, (2, 2)),
}


def make_texts() -> list[ScoredText]:
    """Ragged texts; two are what the model would say itself."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(16, 1), (3, 2), (12, 11), (2, 1), (9, 4), (16, 15), (7, 6)]
    ragged = [ScoredText(torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist(), first) for n, first in shapes]
    whole = ragged[2].tokens  # and choices after one beginning, of one token and of more
    alike = [([*whole[:11], token], 11) for token in (3, 4)] + [(whole[:8], 5), (whole[:8], 7), ([*whole[:7], 1, 2], 7)]
    return ragged + [ScoredText(tokens, first) for tokens, first in alike]


def score_by_hand() -> tuple[list[ScoredText], list[Score]]:
    model = build_model().eval()
    texts, scores = make_texts(), []
    with torch.no_grad():
        for i, text in enumerate(texts):
            tokens = list(text.tokens)
            for place in range(text.first, len(tokens)) if i in (4, 6) else ():
                logits = model(torch.tensor([tokens[:place]]), torch.arange(place)[None], None)
                tokens[place] = int(logits[0, -1, :VOCAB_SIZE].argmax())
            texts[i] = ScoredText(tokens, text.first)
            logits = model(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1)[None], None)
            log_probs = logits[0, :, :VOCAB_SIZE].double().log_softmax(-1)
            answers = [
                (log_probs[place - 1, tokens[place]], log_probs[place - 1]) for place in range(text.first, len(tokens))
            ]
            is_greedy = all(bool(chosen == row.max()) for chosen, row in answers)
            scores.append(Score(float(sum(chosen for chosen, _ in answers)), is_greedy))
    return texts, scores


@pytest.fixture(scope="module")
def expected() -> tuple[list[ScoredText], list[Score]]:
    return run_ranks(1, score_by_hand)[0]


def score_in_layout(layout: tuple, texts: list[ScoredText], batch_size: int) -> list[Score]:
    return score([build_model(*layout)], texts, batch_size=batch_size)


def require_equal(found: list[Score], reference: list[Score]) -> None:
    assert [one.is_greedy for one in found] == [one.is_greedy for one in reference]
    assert [one.log_likelihood for one in found] == pytest.approx([one.log_likelihood for one in reference], rel=2e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_one_process(batch_size: int, expected: tuple[list[ScoredText], list[Score]]) -> None:
    texts, reference = expected
    assert {one.is_greedy for one in reference} == {True, False}
    require_equal(run_ranks(1, score_in_layout, (), texts, batch_size)[0], reference)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_rank_of_a_layout(layout: str, expected: tuple[list[ScoredText], list[Score]]) -> None:
    texts, reference = expected
    world_size, sizes = LAYOUTS[layout]
    for found in run_ranks(world_size, score_in_layout, sizes, texts, 2):
        require_equal(found, reference)


def test_texts_that_begin_alike_are_read_once() -> None:
    texts = make_texts()
    rows = rows_of(texts)
    assert sorted(number for row in rows for number, _, _ in row.targets) == list(range(len(texts)))
    read = {tuple(text.tokens[:-1]) for text in texts}
    longest = {one for one in read if not any(other != one and other[: len(one)] == one for other in read)}
    assert {row.tokens for row in rows} == longest and len(rows) == len(longest)
    assert [2, 7, 8] in [sorted(number for number, _, _ in row.targets) for row in rows]
    for row in rows:
        for number, first, labels in row.targets:
            text = texts[number]
            assert [*row.tokens[: first + len(labels)]] == [*text.tokens[:-1]]
            assert [*text.tokens[: first + 1], *labels] == [*text.tokens]


def rows_of_rank(num_rows: int, batch_size: int, num_batches: int) -> list:
    parallel_state.initialize_model_parallel()
    return [(share.batches, share.begin, share.end) for share in shares(num_rows, batch_size, num_batches)]


@pytest.mark.parametrize(("num_rows", "batch_size", "num_batches"), [(11, 2, 2), (1, 4, 1), (8, 2, 1), (0, 2, 2)])
def test_every_row_is_run_once(num_rows: int, batch_size: int, num_batches: int) -> None:
    of_ranks = run_ranks(2, rows_of_rank, num_rows, batch_size, num_batches)
    assert [[[len(b) for b in go[0]] for go in own] for own in of_ranks[:1]] * 2 == [
        [[len(b) for b in go[0]] for go in own] for own in of_ranks
    ]
    rows = [row for own in of_ranks for go in own for batch in go[0] for row in batch if row is not None]
    assert sorted(rows) == list(range(num_rows))
    for own in of_ranks:
        for batches, begin, end in own:
            assert all(begin <= row < end for batch in batches for row in batch if row is not None)
            assert len(batches) <= num_batches


def test_a_text_without_anything_to_predict_is_refused() -> None:
    for tokens, first in (([1, 2], 0), ([1, 2], 2), ([1], 1)):
        with pytest.raises(ValueError, match="cannot be predicted"):
            ScoredText(tokens, first)
