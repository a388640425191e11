import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.training.tokenizer import bpe_engines, build_tokenizer, vocab_size_with_padding, word_memory
from megatron.training.tokenizer.bert_tokenizer import BertWordPieceTokenizer
from megatron.training.tokenizer.bpe_engines import has_tiktoken
from megatron.training.tokenizer.gpt2_bpe_tokenizer import GPT2BPETokenizer
from megatron.training.tokenizer.tokenizer import _NullTokenizer
from tests.unit_tests.tokenizer.vocabularies import SENTENCES, write_bpe, write_sentencepiece


def build(tokenizer_type: str | None, **settings: object):
    names = ("vocab_size", "vocab_file", "merge_file", "tokenizer_model")
    given = dict.fromkeys(names) | {"vocab_extra_ids": 0, "tokenizer_type": tokenizer_type} | settings
    return build_tokenizer(SimpleNamespace(**given))


@pytest.fixture(scope="module")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def bpe(bpe_files: tuple[str, str]):
    return build("GPT2BPETokenizer", vocab_file=bpe_files[0], merge_file=bpe_files[1])


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sentencepiece(tmp_path_factory.mktemp("spm"))


@pytest.mark.parametrize(
    ("size", "divisor", "tp", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 2, 50432), (128, 128, 1, 128), (1, 1, 3, 3), (129, 64, 1, 192)],
)
def test_vocabulary_padding(size: int, divisor: int, tp: int, padded: int) -> None:
    assert vocab_size_with_padding(size, divisor, tp) == padded


# -- GPT2BPETokenizer ----------------------------------------------------------------------------------


def test_bpe_properties(bpe, bpe_files: tuple[str, str]) -> None:
    assert bpe.vocab_size == 380 and bpe.eod == bpe.eos == 379
    assert bpe.vocab["<|endoftext|>"] == 379 and bpe.inv_vocab[379] == "<|endoftext|>"
    identifiers = {"class": "_GPT2BPETokenizer", "tokenizer_path": list(bpe_files)}
    assert dict(bpe.unique_identifiers) == identifiers
    assert json.loads(bpe.unique_description) == identifiers
    for name in ("pad", "cls", "sep", "mask", "bos"):
        with pytest.raises(NotImplementedError, match=f"GPT2BPETokenizer has no '{name}'"):
            getattr(bpe, name)


def slow_bpe(text: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """Byte-level BPE of one word that starts with no more than a space."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    symbol = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    parts = [symbol[byte] for byte in text.encode("utf-8")]
    while len(parts) > 1:
        ranks = [merges.index(pair) if pair in merges else len(merges) for pair in zip(parts, parts[1:])]
        if min(ranks) == len(merges):
            break
        first, second = merges[min(ranks)]
        joined: list[str] = []
        i = 0
        while i < len(parts):
            if parts[i : i + 2] == [first, second]:
                joined.append(first + second)
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
    return [vocab[part] for part in parts]


def test_bpe_ids_follow_the_merges(bpe, bpe_files: tuple[str, str]) -> None:
    lines = Path(bpe_files[1]).read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    for text in ("the", " tokens", " Größe", " 世界", "🎉", " shells"):
        assert bpe.tokenize(text) == slow_bpe(text, bpe.vocab, merges)
    words = [" the", " dog", "'s", " 345", "!?", "\n"]  # pieces that are never merged with each other
    expected = [token for word in words for token in slow_bpe(word, bpe.vocab, merges)]
    assert bpe.tokenize("".join(words)) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_bpe_round_trip_and_offsets(bpe, text: str) -> None:
    ids = bpe.tokenize(text)
    assert bpe.detokenize(ids) == text
    assert bpe.detokenize(numpy.array(ids, dtype=numpy.int64)) == text
    offsets = bpe.offsets(ids, text)
    positions = [i for i, character in enumerate(text) for _ in character.encode("utf-8")]
    position = 0
    for token, offset in zip(ids, offsets, strict=True):
        assert offset == positions[position]
        position += len(bpe.inv_vocab[token])
    assert position == len(positions)
    assert bpe.offsets([*ids, bpe.eod], text) == [*offsets, len(text)]


# White space of all kinds (four are white space for Python only), what stands for cuts inside, words and signs.
SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000   \n\n"
MIXED = st.text(alphabet=st.sampled_from(SPACES + "ab'std1²é.,你🎉\u200b\ufeff\x01\x02"), max_size=16)


@pytest.mark.skipif(not has_tiktoken(), reason="tiktoken is not installed")
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(MIXED, max_size=6))
def test_many_texts_in_one_call_of_tiktoken(bpe, bpe_files: tuple[str, str], texts: list[str]) -> None:
    fast = _tiktoken_of(bpe_files)
    ids, lengths = fast.tokenize_flat(texts)
    expected = [bpe.tokenize(text) for text in texts]
    assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))


@cache
def _tiktoken_of(bpe_files: tuple[str, str]) -> GPT2BPETokenizer:
    return GPT2BPETokenizer(*bpe_files, engine="tiktoken")


def test_parts_of_many_texts(bpe_files: tuple[str, str], bpe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_engines, "_JOINED_CHARACTERS", 5)
    texts = ["a  b", "", "more than five", "", "c", "d\n", " e"]
    ids, lengths = GPT2BPETokenizer(*bpe_files).tokenize_flat(texts)
    expected = [bpe.tokenize(text) for text in texts]
    assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))


def test_bpe_end_of_text_is_never_found_in_a_text(bpe) -> None:
    ids = bpe.tokenize("a<|endoftext|>b")
    assert bpe.eod not in ids and bpe.detokenize(ids) == "a<|endoftext|>b"
    assert bpe.detokenize([*bpe.tokenize("a"), bpe.eod]) == "a<|endoftext|>"


def test_bpe_offsets_of_another_text_are_refused(bpe) -> None:
    with pytest.raises(ValueError, match="the tokens have 3 bytes, the text has 1"):
        bpe.offsets(bpe.tokenize("abc"), "a")


def test_bpe_with_bad_files(tmp_path: Path, bpe_files: tuple[str, str]) -> None:
    vocab_file, merge_file = bpe_files
    with pytest.raises(FileNotFoundError, match="no vocabulary file /nowhere"):
        build("GPT2BPETokenizer", vocab_file="/nowhere", merge_file=merge_file)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ValueError, match="are not a BPE vocabulary"):
        build("GPT2BPETokenizer", vocab_file=str(bad), merge_file=merge_file)
    vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"]
    bad.write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the token <\|endoftext\|>"):
        build("GPT2BPETokenizer", vocab_file=str(bad), merge_file=merge_file)


# -- SentencePiece -------------------------------------------------------------------------------------


def reference(model_file: str):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=model_file)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_ids_are_the_models(kind: str, model_file: str) -> None:
    tokenizer, model = build(kind, tokenizer_model=model_file), reference(model_file)
    start = [1] if kind == "Llama2Tokenizer" else []
    for text in [*SENTENCES[:4], "", " a  b\n\n c", "unseen ☃ char"]:
        ids = tokenizer.tokenize(text)
        assert ids == start + model.encode(text)
        assert tokenizer.detokenize(ids) == text
    assert tokenizer.tokenize_batch(SENTENCES[:4]) == [tokenizer.tokenize(text) for text in SENTENCES[:4]]
    assert tokenizer.tokenize_batch([]) == []
    assert tokenizer.unique_identifiers["class"] == f"_{kind}"
    assert tokenizer.unique_identifiers["vocab_extra_ids"] == "0"


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_special_ids(kind: str, model_file: str) -> None:
    tokenizer = build(kind, tokenizer_model=model_file)
    assert tokenizer.vocab_size == 360 == len(tokenizer.vocab) == len(tokenizer.inv_vocab)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod) == (1, 2, 2)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (-1, -1, -1)
    assert tokenizer.additional_special_tokens_ids is None
    if kind == "GPTSentencePieceTokenizer":
        assert tokenizer.pad == -1
    else:
        assert tokenizer.tokenize("a", bos=False, eos=True) == [*tokenizer.tokenize("a")[1:], 2]
        with pytest.raises(NotImplementedError):
            _ = tokenizer.pad


def test_sentencepiece_adds_special_tokens(model_file: str) -> None:
    tokenizer = build("SentencePieceTokenizer", tokenizer_model=model_file, vocab_extra_ids=3)
    assert tokenizer.vocab_size == 360 + 5 + 3
    special = (tokenizer.cls, tokenizer.sep, tokenizer.eod, tokenizer.mask, tokenizer.pad)
    assert special == (360, 361, 362, 363, 364)
    assert tokenizer.inv_vocab[364] == "<PAD>"
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)  # the model has them
    assert tokenizer.additional_special_tokens_ids == [365, 366, 367]
    text = "the dog<SEP>the fox <extra_id_2><MASK>."
    ids = tokenizer.tokenize(text)
    model = reference(model_file)
    parts = [model.encode(part) for part in ("the dog", "the fox ", ".")]
    assert ids == [*parts[0], 361, *parts[1], 367, 363, *parts[2]]
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.unique_identifiers["vocab_extra_ids"] == "3"


def test_sentencepiece_keeps_the_models_own_special_tokens(tmp_path: Path) -> None:
    model_file = write_sentencepiece(tmp_path, user_defined_symbols=["<MASK>", "<EOD>"], pad_id=3)
    tokenizer = build("SentencePieceTokenizer", tokenizer_model=model_file)
    assert tokenizer.mask == tokenizer.vocab["<MASK>"] < 360 and tokenizer.eod < 360
    assert tokenizer.pad == 3 and tokenizer.vocab_size == 362


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_offsets_point_at_the_pieces(kind: str, model_file: str) -> None:
    tokenizer = build(kind, tokenizer_model=model_file)
    text = "Größe: 你好 and the dog"
    ids = tokenizer.tokenize(text)
    offsets = tokenizer.offsets(ids, text)
    assert len(offsets) == len(ids)
    for token, offset in zip(ids, offsets):
        piece = tokenizer.inv_vocab[token].lstrip("▁")
        if piece and not piece.startswith("<"):
            start = offset + (text[offset] == " ")
            assert text[start:].startswith(piece)


def test_sentencepiece_offsets_with_special_tokens(model_file: str) -> None:
    tokenizer = build("SentencePieceTokenizer", tokenizer_model=model_file)
    text = "dog<SEP>fox<MASK>"
    ids = [*tokenizer.tokenize(text), tokenizer.eod]
    offsets = dict(zip(ids, tokenizer.offsets(ids, text)))
    assert (offsets[tokenizer.sep], offsets[tokenizer.mask], offsets[tokenizer.eod]) == (3, 11, len(text))


def test_bad_sentencepiece_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no SentencePiece model /nowhere"):
        build("Llama2Tokenizer", tokenizer_model="/nowhere")
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
        build("Llama2Tokenizer", tokenizer_model=str(tmp_path / "bad.model"))


# -- HuggingFaceTokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordpiece_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcB1.,'-#é你", "##a", "##b", "ab", "##ab1", "cab"]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return str(path)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.text(alphabet=st.sampled_from(SPACES + "aabbcB1.,'-#é\u0301你ß\x00\x02\x7f"), max_size=16), max_size=6
    ),
    lower=st.booleans(),
)
def test_wordpiece_of_remembered_words(wordpiece_files: str, texts: list[str], lower: bool) -> None:
    tokenizer = _wordpiece(wordpiece_files, lower)
    expected = tokenizer.tokenize_batch(texts)
    ids, lengths = tokenizer.tokenize_flat(texts)
    assert ids.tolist() == sum(expected, []) and lengths.tolist() == list(map(len, expected))


@cache
def _wordpiece(vocab_file: str, lower: bool) -> BertWordPieceTokenizer:
    return BertWordPieceTokenizer(vocab_file, lower)


def test_wordpiece_forgets(wordpiece_files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_memory, "_REMEMBERED_CHARACTERS", 3)
    tokenizer = BertWordPieceTokenizer(wordpiece_files)
    for text in ("abab a", "cab é", "a.b cab", "x" * 101 + " " + "a" * 100):
        assert tokenizer.tokenize_flat([text])[0].tolist() == tokenizer.tokenize(text)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, bpe_files: tuple[str, str]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE.from_file(*bpe_files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>")
    fast.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("bare_file", [False, True])
def test_hugging_face(hf_folder: str, bpe, bare_file: bool) -> None:
    path = f"{hf_folder}/tokenizer.json" if bare_file else hf_folder
    tokenizer = build("HuggingFaceTokenizer", tokenizer_model=path)
    for text in SENTENCES[:4]:
        ids = tokenizer.tokenize(text)
        assert ids == bpe.tokenize(text) and tokenizer.detokenize(ids) == text
        assert tokenizer.offsets(ids, text) == bpe.offsets(ids, text)
        assert tokenizer.offsets([*ids, tokenizer.eod], text)[-1] == len(text)
    assert tokenizer.tokenize_batch(SENTENCES[:4]) == [bpe.tokenize(text) for text in SENTENCES[:4]]
    assert tokenizer.tokenize_batch([]) == []
    assert tokenizer.vocab_size == 381  # the vocabulary and <s>
    assert tokenizer.eod == tokenizer.eos == 379 and tokenizer.bos == 380
    assert tokenizer.vocab["<s>"] == 380 and tokenizer.inv_vocab[380] == "<s>"
    with pytest.raises(NotImplementedError, match="has no 'mask'"):
        _ = tokenizer.mask
    with pytest.raises(ValueError, match="are not those of the text"):
        tokenizer.offsets([1, 2], "a longer text")
    identifiers = {"class": "_HuggingFaceTokenizer", "tokenizer_path": [path]}
    assert dict(tokenizer.unique_identifiers) == identifiers


def test_missing_hugging_face_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot be read as a Hugging Face tokenizer"):
        build("HuggingFaceTokenizer", tokenizer_model=str(tmp_path))


# -- NullTokenizer and the choice ----------------------------------------------------------------------


def test_null_tokenizer() -> None:
    tokenizer = build("NullTokenizer", vocab_size=100)
    assert tokenizer.vocab_size == 101 and tokenizer.eod == 100
    assert tokenizer.tokenize("3 1  99") == [3, 1, 99] and tokenizer.detokenize([3, 1, 99]) == "3 1 99"
    assert tokenizer.offsets([3, 12, 99], "3 12 99") == [0, 2, 5]
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (-1, -1, -1)
    for wrong in ("a", "-1", "101", "1.5"):
        with pytest.raises(ValueError, match=f"'{wrong}' is not a token id between 0 and 100"):
            tokenizer.tokenize(f"5 {wrong}")
    identifiers = {"class": "_NullTokenizer", "tokenizer_path": [None], "vocab_size": "100"}
    assert dict(tokenizer.unique_identifiers) == identifiers
    assert _NullTokenizer(vocab_size=64).vocab_size == 65


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokenizer_type": None}, ValueError, "--tokenizer-type is not given: choose one of BertWordPiece"),
        ({"tokenizer_type": "Word"}, ValueError, "--tokenizer-type Word is unknown: choose one of BertWordPiece"),
        (
            {"tokenizer_type": "MultimodalTokenizer", "tokenizer_model": "x"},
            ValueError,
            "MultimodalTokenizer needs --tokenizer-prompt-format",
        ),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "x"}, ValueError, "needs --tiktoken-pattern"),
        ({"tokenizer_type": "BertWordPieceCase"}, ValueError, "BertWordPieceCase needs --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, ValueError, "GPT2BPETokenizer needs --vocab-file"),
        ({"tokenizer_type": "Llama2Tokenizer"}, ValueError, "Llama2Tokenizer needs --tokenizer-model"),
        ({"tokenizer_type": "NullTokenizer"}, ValueError, "NullTokenizer needs --vocab-size"),
    ],
)
def test_what_is_refused(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(**settings)


def test_extra_ids_without_effect_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    build("NullTokenizer", vocab_size=10, vocab_extra_ids=5)
    assert "--vocab-extra-ids 5 has no effect on NullTokenizer" in caplog.text
