"""Windows predict every token once, with as much before it as the stride allows."""

from __future__ import annotations

import pytest

from tasks.zeroshot_gpt.datasets import windows
from tasks.zeroshot_gpt.detokenizer import corpus_of, detokenize


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("num_tokens", [2, 4, 5, 8, 9, 23])
def test_every_token_is_predicted_once(num_tokens: int, length: int) -> None:
    for stride in range(1, length + 1):
        found = windows(list(range(num_tokens)), length, stride)
        predicted = [token for window in found for token in window.tokens[window.first :]]
        assert predicted == list(range(1, num_tokens))
        assert all(len(window.tokens) <= length + 1 for window in found)
        assert all(window.first >= length - stride + 1 for window in found[1:])  # how much is known before it


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (" = = = Deep = = = \n", " === Deep ===\n"),
        (
            "the 1 @.@ 5 @-@ metre , 2 @,@ 000 year old thing ; so : there !",
            "the 1.5-metre, 2,000 year old thing; so: there !",
        ),
        ('he said " no " ( or [ yes ] ) . And', 'he said "no" (or [yes]). And'),
        ("the dog 's bone at 20 ° C", "the dog's bone at 20°C"),
    ],
)
def test_wikitext_reads_like_text(words: str, text: str) -> None:
    assert detokenize(words) == text


def test_the_path_names_the_corpus() -> None:
    assert corpus_of("/data/ptb/test.txt") == "ptb"
    assert corpus_of("/data/wiki.test.tokens") == corpus_of("wikitext-103/test.txt") == "wikitext"
    assert detokenize("it does n't cost $ 1", "ptb") == "it doesn't cost $1"
