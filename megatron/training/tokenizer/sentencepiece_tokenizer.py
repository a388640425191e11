"""Tokenizers on SentencePiece models (arXiv:1808.06226)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


class _SentencePieceModel(MegatronTokenizer):
    """What all tokenizers on a SentencePiece model share."""

    def __init__(self, model_file: str, **options: Any) -> None:
        super().__init__(model_file, **options)
        self._model = _load(model_file)
        size = self._model.get_piece_size()
        self._inv_vocab = {token: self._model.id_to_piece(token) for token in range(size)}
        self._vocab = {piece: token for token, piece in self._inv_vocab.items()}

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def detokenize(self, ids: numpy.ndarray | Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def offsets(self, ids: list[int], text: str) -> list[int]:
        return self._run_offsets([int(token) for token in ids], text)

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

    @property
    def vocab_size(self) -> int:
        return len(self._inv_vocab)

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def bos(self) -> int:
        return self._model.bos_id()

    @property
    def eos(self) -> int:
        return self._model.eos_id()

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        """Ids of sentinels; None: there are none."""
        return None


class GPTSentencePieceTokenizer(_SentencePieceModel):
    """The model's own vocabulary; its end-of-sentence id ends documents."""

    identifier = "_GPTSentencePieceTokenizer"

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)

    @property
    def eod(self) -> int:
        return self._model.eos_id()

    @property
    def pad(self) -> int:
        return self._model.pad_id()

    @property
    def cls(self) -> int:
        return -1

    @property
    def sep(self) -> int:
        return -1

    @property
    def mask(self) -> int:
        return -1


class Llama2Tokenizer(_SentencePieceModel):
    """The model's own vocabulary; every text starts with the beginning-of-sentence id."""

    identifier = "_Llama2Tokenizer"

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)

    def tokenize(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return self._model.encode(text, add_bos=bos, add_eos=eos)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, add_bos=True, num_threads=1)

    @property
    def eod(self) -> int:
        return self._model.eos_id()

    @property
    def cls(self) -> int:
        return -1

    @property
    def sep(self) -> int:
        return -1

    @property
    def mask(self) -> int:
        return -1


class SentencePieceTokenizer(_SentencePieceModel):
    """The model's vocabulary with the special tokens that masked and encoder-decoder models need after it.

    Added where the model lacks them: <CLS>, <SEP>, <EOD>, <MASK>, the pieces for padding, beginning and end
    of sentence, and `vocab_extra_ids` sentinels <extra_id_i>. Where an added one stands literally in a text,
    it becomes its id.
    """

    identifier = "_SentencePieceTokenizer"

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        super().__init__(model_file, vocab_extra_ids=vocab_extra_ids)
        self._specials: dict[str, int] = {}
        self._cls_id, self._sep_id, self._eod_id, self._mask_id = (
            self._add(name) for name in ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
        )
        self._pad_id = self._add(self._piece_or(self._model.pad_id(), "<PAD>"))
        self._bos_id = self._add(self._piece_or(self._model.bos_id(), "<BOS>"))
        self._eos_id = self._add(self._piece_or(self._model.eos_id(), "<EOS>"))
        self._sentinel_ids = [self._add(f"<extra_id_{i}>") for i in range(vocab_extra_ids)]
        self._special_ids = {token: name for name, token in self._specials.items()}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._specials)) + ")")

    def _piece_or(self, token: int, name: str) -> str:
        return self._inv_vocab[token] if token >= 0 else name

    def _add(self, name: str) -> int:
        """The id of a token, added at the end of the vocabulary if it has none."""
        if name not in self._vocab:
            token = len(self._inv_vocab)
            self._vocab[name] = self._specials[name] = token
            self._inv_vocab[token] = name
        return self._vocab[name]

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._split(text)):
            ids.extend([self._specials[part]] if i % 2 else self._model.encode(part))
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
        return self._pattern.split(text) if self._specials else [text]

    def _runs(self, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
        """Runs of the model's own ids, each with the added token after it ("" at the end)."""
        run: list[int] = []
        for token in ids:
            if token in self._special_ids:
                yield self._special_ids[token], run
                run = []
            else:
                run.append(token)
        yield "", run

    @property
    def cls(self) -> int:
        return self._cls_id

    @property
    def sep(self) -> int:
        return self._sep_id

    @property
    def pad(self) -> int:
        return self._pad_id

    @property
    def bos(self) -> int:
        return self._bos_id

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def eos(self) -> int:
        return self._eos_id

    @property
    def mask(self) -> int:
        return self._mask_id

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of the sentinels <extra_id_i>."""
        return self._sentinel_ids


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
