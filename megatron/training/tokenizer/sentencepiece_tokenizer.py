"""Tokenizers on SentencePiece models (arXiv:1808.06226)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from megatron.training.tokenizer.base import VocabularyTokenizer


class _SentencePieceModel(VocabularyTokenizer):
    """What all tokenizers on a SentencePiece model share."""

    def __init__(self, model_file: str, **options: Any) -> None:
        super().__init__(model_file, **options)
        self._model = _load(model_file)
        pieces = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        self._set_vocabulary({piece: token for token, piece in enumerate(pieces)})
        self._inv_vocab = dict(enumerate(pieces))

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def offsets(self, ids: list[int], text: str) -> list[int]:
        return self._run_offsets([int(token) for token in ids], text)

    def _tokenize_part(self, text: str, is_first: bool) -> numpy.ndarray:
        if self._adds_space and not is_first:
            text = text[1:]  # the model puts the space of the cut back
        return numpy.array(self._encode_part(text, is_first), numpy.int64)

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        return self.tokenize(text)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the model puts a space before every text."""
        return self._model.encode("word word") == self._model.encode("word") * 2

    @cached_property
    def _cuts(self) -> str:  # type: ignore[override]
        """A space, unless pieces go on past one: then a text has the ids of its words, one after another."""
        crosses = any("▁" in piece.lstrip("▁") for piece in self._inv_vocab.values())
        word, spaced, both = (self._model.encode(text) for text in ("word", " word", "word word"))
        return " " if not crosses and both == word + (word if self._adds_space else spaced) else ""

    def _run_offsets(self, ids: list[int], text: str) -> list[int]:
        """Where the pieces of `ids`, which are all of the model, start in `text`."""
        controls = [self._model.is_control(token) for token in ids]
        pieces = _pieces(self._model.encode, text)
        ordinary = [token for token, is_control in zip(ids, controls) if not is_control]
        if [piece.id for piece in pieces] != ordinary:  # not the encoding of the text: take them as they are read
            pieces = _pieces(self._model.decode, ordinary)
        lengths = iter(len(piece.surface) for piece in pieces)
        starts, position = [], 0
        for is_control in controls:
            starts.append(position)
            position += 0 if is_control else next(lengths)
        return starts


class GPTSentencePieceTokenizer(_SentencePieceModel):
    """The model's own vocabulary; its end-of-sentence id ends documents."""

    identifier = "_GPTSentencePieceTokenizer"

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)
        bos, eos, pad = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()
        self._special_ids = {"bos": bos, "eos": eos, "eod": eos, "pad": pad} | _NO_MASKING


class Llama2Tokenizer(_SentencePieceModel):
    """The model's own vocabulary; every text starts with the beginning-of-sentence id."""

    identifier = "_Llama2Tokenizer"

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self._special_ids = {"bos": bos, "eos": eos, "eod": eos} | _NO_MASKING

    def tokenize(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return self._model.encode(text, add_bos=bos, add_eos=eos)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, add_bos=True, num_threads=1)

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        return self._model.encode(text, add_bos=is_first)


_NO_MASKING = {"cls": -1, "sep": -1, "mask": -1}


class SentencePieceTokenizer(_SentencePieceModel):
    """The model's vocabulary with the special tokens that masked and encoder-decoder models need after it.

    Added where the model lacks them: <CLS>, <SEP>, <EOD>, <MASK>, the pieces for padding, beginning and end
    of sentence, and `vocab_extra_ids` sentinels <extra_id_i>. Where an added one stands literally in a text,
    it becomes its id.
    """

    identifier = "_SentencePieceTokenizer"

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        super().__init__(model_file, vocab_extra_ids=vocab_extra_ids)
        num_pieces = self.vocab_size
        for name in ("cls", "sep", "eod", "mask"):
            self._special_ids[name] = self._add_token(f"<{name.upper()}>")
        for name in ("pad", "bos", "eos"):
            token = getattr(self._model, f"{name}_id")()
            piece = self._inv_vocab[token] if token >= 0 else f"<{name.upper()}>"
            self._special_ids[name] = self._add_token(piece)
        self._add_sentinels(vocab_extra_ids)
        self._added = {self._inv_vocab[token]: token for token in range(num_pieces, self.vocab_size)}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._added)) + ")")

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._split(text)):
            ids.extend([self._added[part]] if i % 2 else self._model.encode(part))
        return ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        parts = []
        for special, run in self._runs([int(token) for token in ids]):
            parts += [self._model.decode(run), special]
        return "".join(parts)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        starts: list[int] = []
        position = 0
        for special, run in self._runs(ids):
            found = text.find(special, position) if special else len(text)
            end = found if found >= 0 else len(text)  # an <EOD> that was added after the text
            starts += [position + start for start in self._run_offsets(run, text[position:end])]
            if special:
                starts.append(end)
                position = min(end + len(special), len(text))
        return starts

    def _split(self, text: str) -> list[str]:
        """Ordinary text and added tokens in turn."""
        return self._pattern.split(text) if self._added else [text]

    def _runs(self, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
        """Runs of the model's own ids, each with the added token after it ("" at the end)."""
        first_added = self._model.get_piece_size()
        run: list[int] = []
        for token in ids:
            if token >= first_added:
                yield self._inv_vocab[token], run
                run = []
            else:
                run.append(token)
        yield "", run


def _pieces(call: Callable[..., Any], value: str | list[int]) -> Any:
    """Pieces with the text that each stands for; `call` is the model's encode or decode."""
    try:
        return call(value, return_type="proto").pieces
    except TypeError:  # older versions of sentencepiece
        return call(value, out_type="immutable_proto").pieces


def _load(model_file: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    if not Path(model_file).is_file():
        raise FileNotFoundError(f"no SentencePiece model {model_file}")
    try:
        return SentencePieceProcessor(model_file=model_file)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{model_file} is not a SentencePiece model: {error}") from None
