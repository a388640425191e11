"""The WordPiece vocabularies of BERT (Devlin et al. 2018, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer
from megatron.training.tokenizer.word_memory import WordMemory


class BertWordPieceTokenizer(VocabularyTokenizer):
    """Ids as BERT's, without [CLS] and [SEP] around them, which the data set adds.

    [BOS], [EOS] and `vocab_extra_ids` sentinels <extra_id_i> are put after the vocabulary. Names of special
    tokens inside a document are encoded like any other text. [EOS] ends documents.

    Args:
        vocab_file: one token a line; the line is the id.
        lower_case: fold case and strip accents.
    """

    identifier = "_BertWordPieceTokenizer"
    _cuts = " \n"

    def __init__(self, vocab_file: str, lower_case: bool = True, vocab_extra_ids: int = 0) -> None:
        super().__init__(vocab_file, lower_case=lower_case, vocab_extra_ids=vocab_extra_ids)
        vocab = _read_vocabulary(vocab_file)
        self._tokenizer = _make(vocab, lower_case)
        # all steps stop at white space and at ASCII signs
        self._words = WordMemory(self.tokenize_batch, self._tokenize_runs)
        ids = {name: vocab[f"[{name.upper()}]"] for name in ("cls", "sep", "pad", "mask")}
        self._set_vocabulary(dict(vocab), **ids)
        bos, eos = self._add_token("[BOS]"), self._add_token("[EOS]")
        self._special_ids |= {"bos": bos, "eos": eos, "eod": eos}
        self._add_sentinels(vocab_extra_ids)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def tokenize_flat(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        return self._words.tokenize(texts)

    def _tokenize_runs(self, runs: list[str]) -> list[list[int]]:
        """Ids of runs of ASCII letters and digits, and of ASCII signs: as one text, each of them is a word of it."""
        found = self._tokenizer.encode(" ".join(runs), add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in runs]
        for word, token in zip(found.word_ids, found.ids):
            ids[word].append(token)
        return ids

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return " ".join(self._inv_vocab[int(token)] for token in ids).replace(" ##", "")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [begin for begin, _ in found.offsets]
        if [int(token) for token in ids[: len(starts)]] != found.ids or len(ids) > len(starts) + 1:
            raise ValueError(f"the {len(ids)} ids are not those of the text, which has {len(starts)} tokens")
        return starts + [len(text)] * (len(ids) - len(starts))  # an end of document after the text


def _read_vocabulary(vocab_file: str) -> dict[str, int]:
    if not Path(vocab_file).is_file():
        raise FileNotFoundError(f"no vocabulary file {vocab_file}")
    try:
        tokens = Path(vocab_file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{vocab_file} is not a WordPiece vocabulary: {error}") from None
    vocab = {token.rstrip("\r"): token_id for token_id, token in enumerate(tokens)}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if name not in vocab]
    if missing:
        raise ValueError(f"{vocab_file} is not a WordPiece vocabulary of BERT: it lacks {', '.join(missing)}")
    if len(vocab) < len(tokens):
        raise ValueError(f"{vocab_file} has {len(tokens)} lines but {len(vocab)} different tokens")
    return vocab


def _make(vocab: dict[str, int], lower_case: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lower_case, lowercase=lower_case
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
