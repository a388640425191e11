"""Ids on real vocabularies are those of the libraries that the vocabularies were made for."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.bert_tokenizer import BertWordPieceTokenizer
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer
from megatron.training.tokenizer.tik_tokenizer import PATTERNS, TikTokenizer
from tests.real_inputs import CACHE, real_input, tiktoken_vocabulary

ROOT = Path(__file__).parents[3]
ODD_TEXTS = [
    "",
    " ",
    "\n\n \t x",
    "Größe, naïve café, 你好世界 and 🎉👩‍👩‍👧 e\u0301 \u200b\u00a0",
    "don't  DON'T   we'll\r\n\r\n1234567890 <|endoftext|> [SEP] </s> <s>",
    "مرحبا שלום ΑΣ Σ ς İI ǅ ﬁ ½",
    "\x00\x01\x7f\x85\u2028\ufeff\U0010ffff",
]


@cache
def english() -> str:
    """Some of Moby Dick."""
    return gzip.decompress((ROOT / "examples/data/moby_dick.txt.gz").read_bytes()).decode("utf-8")[60_000:260_000]


def texts() -> list[str]:
    return [*ODD_TEXTS, *(english()[i : i + 5000] for i in range(0, len(english()), 5000))]


@cache
def tokenizer(kind: str):
    names = ("vocab_size", "vocab_file", "merge_file", "tokenizer_model", "tiktoken_pattern", "tiktoken_special_tokens")
    given = dict.fromkeys(names) | {"vocab_extra_ids": 0, "tiktoken_num_special_tokens": 1000, "tokenizer_type": kind}
    match kind:
        case "GPT2BPETokenizer":
            given |= {"vocab_file": real_input("gpt2-vocab.json"), "merge_file": real_input("gpt2-merges.txt")}
        case "BertWordPieceLowerCase":
            given |= {"vocab_file": real_input("bert-vocab.txt"), "vocab_extra_ids": 5}
        case "BertWordPieceCase":
            given |= {"vocab_file": real_input("bert-chinese-vocab.txt")}
        case "TikTokenizer":
            given |= {"tokenizer_model": tiktoken_vocabulary(), "tiktoken_pattern": "v2"}
        case "SentencePieceTokenizer":
            given |= {"tokenizer_model": real_input("t5/spiece.model"), "vocab_extra_ids": 100}
        case _:
            given |= {"tokenizer_model": real_input("llama.model")}
    return build_tokenizer(SimpleNamespace(**given))


def gpt2_reference():
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast(vocab=real_input("gpt2-vocab.json"), merges=real_input("gpt2-merges.txt"))


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.lists(ANY_TEXT | st.sampled_from(["the dog", " ", "\n", "x1 2y", "Zürich", "ab\ncd"]), max_size=12).map(
    " ".join
)


# -- ids -----------------------------------------------------------------------------------------------


def test_published_ids() -> None:
    gpt2 = tokenizer("GPT2BPETokenizer")
    expected = [15496, 995, 11, 428, 318, 402, 11571, 12, 17, 0]
    assert gpt2.tokenize("Hello world, this is GPT-2!") == expected and gpt2.eod == 50256 and gpt2.vocab_size == 50257
    bert = tokenizer("BertWordPieceLowerCase")
    fox = "The quick brown fox jumps over the lazy dog."
    expected = [1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012]
    assert bert.tokenize(fox) == expected and (bert.cls, bert.sep, bert.pad, bert.mask) == (101, 102, 0, 103)
    assert tokenizer("Llama2Tokenizer").tokenize("Hello world") == [1, 22557, 1526]
    assert tokenizer("SentencePieceTokenizer").tokenize("Hello world") == [8774, 296]


ENGINES = ["tokenizers", "tiktoken"] + ["gigatoken"] * (importlib.util.find_spec("gigatoken") is not None)


@pytest.mark.parametrize("engine", ENGINES)
def test_gpt2_engines_give_the_ids_of_transformers(engine: str) -> None:
    ours = GPT2BPETokenizer(real_input("gpt2-vocab.json"), real_input("gpt2-merges.txt"), engine=engine)
    reference = tokenizer("GPT2BPETokenizer")
    ids, lengths = ours.tokenize_flat(texts())
    expected = [reference.tokenize(text) for text in texts()]
    assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))
    theirs = gpt2_reference()
    for text, found in zip(texts(), expected):
        if "<|endoftext|>" not in text:
            assert theirs(text).input_ids == found


@pytest.mark.slow
def test_gpt2_engines_split_at_every_character_alike() -> None:
    files = real_input("gpt2-vocab.json"), real_input("gpt2-merges.txt")
    lines = []
    for start in range(0, sys.maxunicode + 1, 512):
        characters = [chr(c) for c in range(start, start + 512) if not 0xD800 <= c < 0xE000]
        lines.append("".join(f"a{c}b {c} {c}1{c}{c}\n" for c in characters))
    found = {engine: GPT2BPETokenizer(*files, engine=engine).tokenize_flat(lines) for engine in ENGINES}
    for ids, lengths in found.values():
        assert numpy.array_equal(lengths, found["tokenizers"][1]) and numpy.array_equal(ids, found["tokenizers"][0])


def test_tiktoken_is_used_only_where_it_follows_the_merges(tmp_path: Path) -> None:
    vocab_file, merge_file = real_input("gpt2-vocab.json"), real_input("gpt2-merges.txt")
    assert GPT2BPETokenizer(vocab_file, merge_file)._tiktoken_ranks() is not None
    lines = Path(merge_file).read_text(encoding="utf-8").splitlines()
    # "Ġ t" comes first, then a token of two such letters that no other pair makes
    lines[1], lines[500] = lines[500], lines[1]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    swapped = GPT2BPETokenizer(vocab_file, str(tmp_path / "merges.txt"))
    assert swapped._tiktoken_ranks() is None
    ids, _ = swapped.tokenize_flat([english()])
    assert ids.tolist() == swapped.tokenize(english())
    with pytest.raises(ValueError, match="tiktoken's engine would not follow these merges"):
        GPT2BPETokenizer(vocab_file, str(tmp_path / "merges.txt"), engine="tiktoken").tokenize_flat(["a"])


@pytest.mark.parametrize(("kind", "lower"), [("BertWordPieceLowerCase", True), ("BertWordPieceCase", False)])
def test_wordpiece_ids_are_those_of_transformers(kind: str, lower: bool) -> None:
    from transformers import BertTokenizerFast

    vocab_file = real_input("bert-vocab.txt" if lower else "bert-chinese-vocab.txt")
    theirs = BertTokenizerFast(vocab=vocab_file, do_lower_case=lower, strip_accents=lower)
    ours = tokenizer(kind)
    for text in texts():
        if "[SEP]" not in text:
            expected = theirs(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            assert ours.tokenize(text) == expected.input_ids
            assert ours.offsets(expected.input_ids, text) == [begin for begin, _ in expected["offset_mapping"]]
    ids, lengths = ours.tokenize_flat(texts())
    assert ids.tolist() == sum(ours.tokenize_batch(texts()), []) and lengths.sum() == len(ids)


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(WORDS, max_size=4))
def test_remembered_words_have_the_ids_of_the_whole_text(batch: list[str]) -> None:
    for kind in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        ours = tokenizer(kind)
        ids, lengths = ours.tokenize_flat(batch)
        expected = [ours.tokenize(text) for text in batch]
        assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))


def test_remembered_words_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.training.tokenizer.word_memory._REMEMBERED_CHARACTERS", 100)
    ours = BertWordPieceTokenizer(real_input("bert-vocab.txt"))
    for text in texts()[-3:]:
        assert ours.tokenize_flat([text])[0].tolist() == ours.tokenize(text)
        assert len(ours._words._places) > 100 and all(word in text + "\x02" for word in ours._words._places)


def test_wordpiece_special_tokens() -> None:
    bert = tokenizer("BertWordPieceLowerCase")
    assert bert.vocab_size == 30522 + 2 + 5 == len(bert.vocab) == len(bert.inv_vocab)
    assert (bert.bos, bert.eos, bert.eod) == (30522, 30523, 30523)
    assert bert.additional_special_tokens_ids == [30524, 30525, 30526, 30527, 30528]
    assert bert.inv_vocab[30528] == "<extra_id_4>"
    assert bert.cls not in bert.tokenize("[CLS]") and bert.detokenize(bert.tokenize("unaffable")) == "unaffable"
    assert bert.offsets([*bert.tokenize("a b"), bert.eod], "a b") == [0, 2, 3]
    with pytest.raises(ValueError, match="are not those of the text"):
        bert.offsets([1, 2, 3], "a")


def test_tiktoken_ids_are_those_of_the_library() -> None:
    import tiktoken

    vocabulary = json.loads(Path(real_input("tekken.json")).read_text(encoding="utf-8"))
    assert PATTERNS["v2"] == vocabulary["config"]["pattern"]
    import base64

    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in vocabulary["vocab"][: 131072 - 1000]}
    theirs = tiktoken.Encoding("x", pat_str=PATTERNS["v2"], mergeable_ranks=ranks, special_tokens={})
    ours = tokenizer("TikTokenizer")
    for text in texts():
        ids = ours.tokenize(text)
        assert ids == [token + 1000 for token in theirs.encode_ordinary(text)]
        assert ours.detokenize(ids) == text
    assert ours.vocab_size == 131072 and (ours.unk, ours.bos, ours.eos, ours.eod) == (0, 1, 2, 2)
    assert ours.inv_vocab[3] == "<SPECIAL_3>" and ours.vocab["<SPECIAL_999>"] == 999
    assert ours.tokenize("a", bos=True, eos=True) == [1, *ours.tokenize("a"), 2]
    assert ours.detokenize([1, *ours.tokenize("a"), 2]) == "<s>a</s>"
    assert ours.tokenize_batch(["a", "", "b c"]) == [ours.tokenize(text) for text in ("a", "", "b c")]
    assert ours.unique_identifiers["class"] == "CustomTikTokenizer"
    assert ours.unique_identifiers["num_special_tokens"] == "1000"


def test_tiktoken_settings() -> None:
    path = tiktoken_vocabulary()
    small = TikTokenizer(
        path, "v1", vocab_size=1000, num_special_tokens=10, special_tokens=["</s>", "<s>", "<unk>", "<x>"]
    )
    assert small.vocab_size == 1000 and (small.eod, small.bos, small.unk) == (0, 1, 2)
    assert small.inv_vocab[3] == "<x>" and small.inv_vocab[4] == "<SPECIAL_4>"
    assert small.detokenize(small.tokenize("Any text, 123 世界")) == "Any text, 123 世界"
    for settings_, message in (
        ({"special_tokens": ["<s>"]}, "must have <unk>, </s>"),
        ({"special_tokens": ["<unk>", "<s>", "</s>", "<s>"]}, "a name twice"),
        ({"num_special_tokens": 2}, "3 special tokens do not fit"),
        ({"vocab_size": 1100}, "must have room for 1000 special tokens and 256 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            TikTokenizer(path, "v1", **settings_)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "is not a vocabulary of TikTokenizer"), ('[{"rank": 1, "token_bytes": "AA=="}]', "entry 0 has the rank 1"),
     ('[{"rank": 0, "token_bytes": "AA=="}]', "the first 256 tokens"), ('{"a": 1}', "is not a vocabulary"),
     ('[{"rank": 0, "token_bytes": "?"}]', "is not a vocabulary")],
)  # fmt: skip
def test_bad_tiktoken_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TikTokenizer(str(tmp_path / "v.json"), "v1")
    with pytest.raises(FileNotFoundError, match="no vocabulary file"):
        TikTokenizer(str(tmp_path / "none.json"), "v1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[CLS]\n[SEP]\n", r"it lacks \[UNK\], \[PAD\], \[MASK\]"),
        ("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\na\n", "7 lines but 6"),
    ],
)
def test_bad_wordpiece_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    given = {"vocab_file": str(tmp_path / "vocab.txt"), "tokenizer_type": "BertWordPieceCase", "vocab_extra_ids": 0}
    with pytest.raises(ValueError, match=message):
        build_tokenizer(SimpleNamespace(**given))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_ids_are_those_of_the_library(kind: str) -> None:
    import sentencepiece

    ours = tokenizer(kind)
    file = real_input("t5/spiece.model" if kind == "SentencePieceTokenizer" else "llama.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=file)
    for text in texts():
        if "</s>" not in text:
            assert ours.tokenize(text) == [1] * (kind == "Llama2Tokenizer") + theirs.encode(text)


def test_t5_sentinels() -> None:
    t5 = tokenizer("SentencePieceTokenizer")
    assert (t5.pad, t5.eos, t5.eod) == (0, 1, 32002) and t5.inv_vocab[32001] == "<SEP>"
    assert t5.additional_special_tokens_ids[0] == t5.vocab["<extra_id_0>"] and t5.vocab_size == 32000 + 5 + 100


def test_hugging_face_folder() -> None:
    from transformers import AutoTokenizer

    real_input("t5/tokenizer.json")
    folder = str(CACHE / "t5")
    ours = build_tokenizer(SimpleNamespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.tokenize_batch(texts()) == [theirs(text, verbose=False).input_ids for text in texts()]
    assert ours.eod == 1 and ours.vocab_size == len(theirs)


# -- arbitrary Unicode ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_round_trips(text: str) -> None:
    for kind in ("GPT2BPETokenizer", "TikTokenizer"):
        ours = tokenizer(kind)
        ids = ours.tokenize(text)
        assert ours.detokenize(ids) == text
        offsets = ours.offsets([*ids, ours.eod], text)
        assert offsets == sorted(offsets) and offsets[-1] == len(text)
    plain = text.replace("▁", "").replace("\x00", "")  # SentencePiece's own letter for a space; a byte that ends text
    llama = tokenizer("GPTSentencePieceTokenizer")
    assert llama.detokenize(llama.tokenize(plain)) == plain


CUTTING = ["GPT2BPETokenizer", "TikTokenizer", "BertWordPieceLowerCase", "SentencePieceTokenizer", "Llama2Tokenizer"]


@pytest.mark.parametrize("kind", [*CUTTING, "BertWordPieceCase", "GPTSentencePieceTokenizer"])
@settings(max_examples=60, deadline=None)
@given(text=WORDS, seed=st.integers(0, 99))
def test_parts_of_a_text_have_its_ids(kind: str, text: str, seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    ours = tokenizer(kind)
    assert numpy.concatenate(list(ours.tokenize_parts(parts))).tolist() == ours.tokenize(text)


@pytest.mark.parametrize("kind", CUTTING)
def test_parts_of_a_book_are_tokenized_one_by_one(kind: str) -> None:
    parts = [english()[i : i + 30_000] for i in range(0, len(english()), 30_000)]
    ours = tokenizer(kind)
    found = list(ours.tokenize_parts(parts))
    assert len(found) == len(parts) + 1
    assert numpy.concatenate(found).tolist() == ours.tokenize(english())


def test_null_multimodal_tokenizer() -> None:
    null = build_tokenizer(SimpleNamespace(tokenizer_type="NullMultimodalTokenizer", vocab_size=100))
    assert null.tokenize("1 2 <image> 3<image>") == [1, 2, -200, 3, -200]
    assert null.detokenize([1, -200, 3]) == "1 <image> 3" and null.eod == 100 and null.vocab_size == 101
    assert null.offsets([1, -200, 3, 100], "1 <image> 3") == [0, 2, 10, 11]
    assert null.convert_tokens_to_ids(["<image>", "7"]) == [-200, 7] and null.convert_tokens_to_ids("<image>") == -200
    with pytest.raises(ValueError, match="'x' is not a token id"):
        null.tokenize("1 <image> x")
