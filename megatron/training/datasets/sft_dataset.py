"""Samples for supervised fine-tuning: one conversation each, learning what the assistant says."""

from __future__ import annotations

import json
import mmap
from typing import Any

import numpy
import torch

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import LowLevelDataset, MegatronDataset
from megatron.core.datasets.sample_origin import DocumentPart, SampleOrigin
from megatron.core.datasets.utils import Split
from megatron.training.tokenizer.sft_tokenizer import IGNORE_INDEX


class SFTLowLevelDataset:
    """The conversations of a file: JSON lines, or one JSON list, of objects with the key `messages`.

    Lines are found when the file is opened and read when they are asked for.

    Raises:
        ValueError: an entry is no JSON object with a list `messages`; the message names file and line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                raise ValueError(f"{path} is empty: it should hold conversations, one JSON object a line")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries: list[Any] | None = None
        if self._bytes[:64].lstrip()[:1] == b"[":
            self._entries = self._parse(self._bytes[:], "the file")
            return
        bounds = _line_bounds(self._bytes)
        filled = [bool(self._bytes[begin:end].strip()) for begin, end in bounds]
        self._lines = numpy.flatnonzero(filled)
        self._bounds = bounds[self._lines]

    def __len__(self) -> int:
        return len(self._lines if self._entries is None else self._entries)

    def __getitem__(self, idx: int) -> list[dict[str, str]]:
        """The messages of a conversation."""
        if self._entries is not None:
            where, entry = f"entry {idx}", self._entries[idx]
        else:
            begin, end = self._bounds[idx].tolist()
            where = f"line {self._lines[idx] + 1}"
            entry = self._parse(self._bytes[begin:end], where)
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            raise ValueError(f"{self.path}, {where}: an object with a list of messages is expected")
        return messages

    def _parse(self, text: bytes, where: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.path}, {where}: no JSON ({error})") from None

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)  # type: ignore[misc]


def _line_bounds(data: mmap.mmap) -> numpy.ndarray:
    """[lines, 2], first byte of each line and the byte after its last."""
    starts = [0]
    while (end := data.find(b"\n", starts[-1])) >= 0:
        starts.append(end + 1)
    ends = numpy.array([*starts[1:], len(data)])
    return numpy.stack([numpy.array(starts), ends], axis=1)


class SFTDataset(MegatronDataset):
    """Conversations cut or padded to `sequence_length`; sample k is conversation k, then they start again.

    Item k is a dictionary like that of `GPTDataset`, without an attention mask. `loss_mask` is 1 where the label is a
    token that the assistant said, or the end of the conversation.

    Raises:
        ValueError: the configuration asks for something that has no meaning here; a conversation is not one.
    """

    config: GPTDatasetConfig

    def __init__(
        self,
        dataset: LowLevelDataset,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        for name in ("reset_position_ids", "reset_attention_mask"):
            if getattr(config, name):
                raise ValueError(f"{name} has no meaning for conversations: each sample is one document")
        if not len(indices) and num_samples != 0:
            raise ValueError(
                f"the {index_split.name} split of {dataset_path} has none of its {len(self.dataset)} conversations; "
                f"use another split ({config.split})"
            )

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Number of conversations; a split is a range of them."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: Any) -> SFTLowLevelDataset:
        """Open a file of conversations."""
        if dataset_path is None:
            raise ValueError("no data is given: name a file of conversations with --data-path")
        return SFTLowLevelDataset(dataset_path)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else self.num_samples

    def samples_per_epoch(self) -> float:
        return float(len(self.indices))

    def origin(self, idx: int) -> SampleOrigin:
        document = int(self.indices[idx % len(self.indices)])
        ids, _ = self._tokenize(document)
        part = DocumentPart(document, 0, min(len(ids), self.config.sequence_length - 1), idx // len(self.indices))
        return SampleOrigin(self.dataset_path, idx, (part,), "tokens", ids[: part.end])

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        tokenizer, s = self.config.tokenizer, self.config.sequence_length
        assert tokenizer is not None
        ids, targets = self._tokenize(int(self.indices[idx % len(self.indices)]))
        kept = min(len(ids), s - 1)
        text = numpy.full(s + 1, tokenizer.pad, dtype=numpy.int64)
        labels = numpy.full(s + 1, IGNORE_INDEX, dtype=numpy.int64)
        text[:kept], labels[:kept] = ids[:kept], targets[:kept]
        text[kept] = labels[kept] = tokenizer.eod
        labels = labels[1:]
        learned = (labels != IGNORE_INDEX) & (labels != tokenizer.pad)
        return {
            "tokens": torch.from_numpy(text[:-1].copy()),
            "labels": torch.from_numpy(numpy.where(learned, labels, 0)),
            "loss_mask": torch.from_numpy(learned.astype(numpy.float32)),
            "position_ids": torch.arange(s, dtype=torch.int64),
        }

    def _tokenize(self, document: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Ids of a conversation, and what is to be learned of them."""
        messages = self.dataset[document]
        try:
            return self.config.tokenizer.tokenize_conversation(messages, return_target=True)  # type: ignore[union-attr]
        except ValueError as error:
            raise ValueError(f"{self.dataset_path}, conversation {document}: {error}") from None
