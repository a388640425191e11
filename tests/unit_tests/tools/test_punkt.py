"""Sentence boundaries: those of NLTK with the same parameters, and nearly those with the built-in ones."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.training.datasets.punkt import (
    PunktParameters,
    PunktSplitter,
    built_in_parameters,
    find_parameters,
    read_parameters,
)
from tests.real_inputs import CACHE, real_input

ROOT = Path(__file__).parents[3]


@cache
def parameters(language: str) -> PunktParameters:
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        real_input(f"punkt_tab/{language}/{name}")
    return read_parameters(CACHE / "punkt_tab" / language)


@cache
def nltk_splitter(language: str, keep_newlines: bool):
    from nltk.tokenize.punkt import PunktLanguageVars, PunktParameters, PunktSentenceTokenizer

    class KeepingNewlines(PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    ours, theirs = parameters(language), PunktParameters()
    theirs.abbrev_types = set(ours.abbreviations)
    theirs.collocations = set(ours.collocations)
    theirs.sent_starters = set(ours.sentence_starters)
    theirs.ortho_context.update(ours.orthography)
    splitter = PunktSentenceTokenizer(lang_vars=KeepingNewlines() if keep_newlines else PunktLanguageVars())
    splitter._params = theirs
    return splitter


@cache
def prose(name: str, begin: int, end: int) -> str:
    return gzip.decompress((ROOT / f"examples/data/{name}.txt.gz").read_bytes()).decode("utf-8")[begin:end]


def test_a_known_text() -> None:
    text = 'Dr. Smith went to Washington. He met Mr. Jones at 5 p.m. on Friday. "Is it No. 7?" he asked (J. R. did).'
    expected = [
        "Dr. Smith went to Washington.",
        "He met Mr. Jones at 5 p.m. on Friday.",
        '"Is it No.',
        '7?"',
        "he asked (J. R. did).",
    ]
    assert PunktSplitter(parameters("english")).split(text) == expected
    assert PunktSplitter(parameters("english")).split("") == []


@pytest.mark.parametrize("language", ["english", "german", "french"])
@pytest.mark.parametrize("keep_newlines", [False, True])
def test_real_text_is_split_as_nltk_does(language: str, keep_newlines: bool) -> None:
    text = prose("moby_dick", 0, 60_000) + prose("state_of_the_union_1790_1860", 2_000_000, 2_030_000)
    expected = nltk_splitter(language, keep_newlines).tokenize(text)
    assert PunktSplitter(parameters(language), keep_newlines).split(text) == expected
    assert len(expected) > 500


WORDS = st.sampled_from("Mr the The U.S e.g A b 3 3.14 1,000 etc John he I p.m x-mr Dr é É".split())
MARKS = st.sampled_from('. |? |! |.\n| | |... |." |.) |”\n|.”\n|. . . |,|--|.|?!| (| "|\'|* |..|\n\n|\t.|:'.split("|"))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.tuples(WORDS, MARKS), max_size=14), start=st.sampled_from(["", " ", '"', "(", ". "]))
def test_any_text_is_split_as_nltk_does(parts: list[tuple[str, str]], start: str) -> None:
    text = start + "".join(word + mark for word, mark in parts)
    for keep_newlines in (False, True):
        expected = nltk_splitter("english", keep_newlines).tokenize(text)
        assert PunktSplitter(parameters("english"), keep_newlines).split(text) == expected


def test_built_in_parameters_agree_nearly_always() -> None:
    text = prose("state_of_the_union_1790_1860", 2_400_000, 2_500_000)
    own, theirs = (PunktSplitter(found).split(text) for found in (built_in_parameters(), parameters("english")))
    assert len(set(own) & set(theirs)) > 0.97 * max(len(own), len(theirs))


def test_parameters_are_found_where_nltk_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokenizers" / "punkt_tab" / "klingon"
    folder.mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", f"/nowhere:{tmp_path}")
    assert find_parameters("klingon") == folder and find_parameters("quenya") is None
    with pytest.raises(ValueError, match="holds no parameters of Punkt"):
        read_parameters(folder)
