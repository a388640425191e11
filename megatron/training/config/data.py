"""Data sets and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.training.tokenizer.config import TokenizerConfig

__all__ = ["DataConfig", "FinetuningDataConfig", "StorageClientConfig", "TokenizerConfig"]


@dataclass(kw_only=True)
class DataConfig:
    """Which data, split and cut how."""

    data_path: list[str] | None = None
    """Prefixes of token files, or weights and prefixes in turn; shared by training, validation and test."""
    split: str | None = None
    """Shares of training, validation and test data, as 969,30,1."""
    train_data_path: list[str] | None = None
    """As --data-path, for training only."""
    valid_data_path: list[str] | None = None
    """As --data-path, for validation only."""
    test_data_path: list[str] | None = None
    """As --data-path, for the test only."""
    data_args_path: str | None = None
    """File that holds the words of --data-path."""
    per_split_data_args_path: str | None = None
    """JSON file with one list of such words for each of train, valid and test."""
    data_cache_path: str | None = None
    """Folder for the sample indices."""
    mmap_bin_files: bool = True
    """Map token files into memory rather than read them."""
    mock_data: bool = False
    """Make up the data."""
    seq_length: int | None = None
    """Tokens per sample."""
    encoder_seq_length: int | None = None
    """Tokens per sample of the encoder; elsewhere another name of --seq-length."""
    decoder_seq_length: int | None = None
    """Tokens per sample of the decoder."""
    retriever_seq_length: int = 256
    """Tokens per passage of the retriever."""
    sample_rate: float = 1.0
    """Share of the evidence passages that is used."""
    mask_prob: float = 0.15
    """Share of tokens that are masked."""
    short_seq_prob: float = 0.1
    """Share of samples that are cut shorter."""
    num_workers: int = 2
    """Processes that load data."""
    reset_position_ids: bool = False
    """Count positions from zero after each end of document."""
    reset_attention_mask: bool = False
    """Let no token see another document."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""
    create_attention_mask_in_dataloader: bool = True
    """Let the loader make attention masks."""
    num_dataset_builder_threads: int = 1
    """Threads that build sample indices."""
    object_storage_cache_path: str | None = None
    """Folder for the indices of data in object storage."""
    mid_level_dataset_surplus: float = 0.005
    """Extra samples drawn from each part of a blend, as a share."""


@dataclass(kw_only=True)
class StorageClientConfig:
    """Which clients of object storage may be used."""

    enable_msc: bool = True
    """Read paths msc:// with the package multi-storage-client."""


@dataclass(kw_only=True)
class FinetuningDataConfig:
    """Supervised fine-tuning on conversations."""

    sft: bool = False
    """Train on conversations."""
    sft_tokenizer_prompt_format: str = "nemotron-h-aligned"
    """Template that turns a conversation into text."""
