"""Files of DPR, the negatives of a question, and how both become tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.models.biencoder.in_batch_loss import in_batch_loss, in_batch_scores
from megatron.training.settings import ConfigurationError
from tasks.retrieval.finetune import pool
from tasks.retrieval.pairs import Pair, QuestionEncoder, Text, read_pairs


def passage(word: str) -> dict[str, Any]:
    return {"title": word.upper(), "text": f"a {word}", "score": 1000, "passage_id": "7"}


ROW = {
    "dataset": "nq_train",
    "question": "who",
    "answers": ["Ahab"],
    "positive_ctxs": [passage("p"), passage("q")],
    "negative_ctxs": [passage("n")],
    "hard_negative_ctxs": [passage("h"), passage("i")],
}


def test_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "nq.json"
    path.write_text(json.dumps([ROW, ROW | {"positive_ctxs": []}, {"question": "a", "positive_ctxs": [{"text": "t"}]}]))
    first, second = read_pairs(path, "F")  # the one without an answer is left out
    assert first.positive == Text("P", "a p") and first.hard == (Text("H", "a h"), Text("I", "a i"))
    assert second == Pair("a", Text("", "t"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question\tanswer", "F: no JSON"),
        ("{}", "F: a list of questions is expected"),
        ("[]", "F: a list of questions is expected"),
        ('[{"question": "a"}]', "F, question 1: positive_ctxs missing"),
        ('[{"question": "a", "positive_ctxs": ["b"]}]', "question 1, positive_ctxs: a list of passages with title"),
        ('[{"question": "a", "positive_ctxs": []}]', "none of its questions has a passage under positive_ctxs"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_pairs(tmp_path / "x.json", "F")


H, I, N = (Text(letter, letter) for letter in "hin")


def test_hard_negatives_come_first_and_again() -> None:
    pair = Pair("q", Text("p", "p"), (H, I), (N,))
    assert pair.negatives(2) == [H, I]
    assert pair.negatives(5) == [H, I, N, H, I]
    assert Pair("q", Text("p", "p")).negatives(1) == [Text("", "")]
    assert list(pool([pair, Pair("r", H, (I,))], 1, 1)) == [Text("p", "p"), H, N, I]  # each once


class Letters:
    """A token for each letter, its code."""

    cls, sep, pad = 1, 2, 0

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_right_passage_is_the_first() -> None:
    row = QuestionEncoder(Letters(), 8, 2)(Pair("ab", Text("t", "cdefgh"), (H,)))
    assert row["query_tokens"].tolist() == [1, 97, 98, 2, 0, 0, 0, 0] and row["query_pad_mask"].sum() == 4
    assert row["context_tokens"].tolist()[0] == [1, 116, 2, 99, 100, 101, 102, 2]
    assert row["context_tokens"][1].tolist() == row["context_tokens"][2].tolist() == [1, 104, 2, 104, 2, 0, 0, 0]


def test_negatives_are_wrong_columns() -> None:
    queries, contexts = torch.randn(3, 4), torch.randn(3, 2, 4)
    loss, own = in_batch_loss(in_batch_scores(queries, contexts.flatten(0, 1), None), None)
    assert own.tolist() == [0, 2, 4]
    scores = torch.einsum("qp,cnp->qcn", queries, contexts)
    expected = sum(scores[i].flatten().logsumexp(0) - scores[i, i, 0] for i in range(3))
    torch.testing.assert_close(loss, torch.as_tensor(expected))
