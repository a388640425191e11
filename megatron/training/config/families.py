"""Settings of programs other than GPT pretraining: retrieval, inference, export, vision and language."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class BiencoderConfig:
    """Retrieval with two encoders, and the inverse cloze task that trains them."""

    ict_head_size: int | None = None
    """Width of a block's embedding."""
    biencoder_projection_dim: int = 0
    """Width of the projection after each encoder; 0 is none."""
    biencoder_shared_query_context_model: bool = False
    """One encoder for queries and passages."""
    ict_load: str | None = None
    """Checkpoint of an ICT model."""
    bert_load: str | None = None
    """BERT checkpoint that the encoders start from."""
    titles_data_path: str | None = None
    """Data set of titles."""
    query_in_block_prob: float = 0.1
    """Chance that the query stays in its block."""
    use_one_sent_docs: bool = False
    """Accept documents of one sentence."""
    evidence_data_path: str | None = None
    """File with the passages to search."""
    retriever_report_topk_accuracies: list[int] = field(default_factory=list)
    """Values of k whose accuracy is reported."""
    retriever_score_scaling: bool = False
    """Divide scores by the square root of the width."""
    block_data_path: str | None = None
    """Store of block embeddings."""
    embedding_path: str | None = None
    """Store of passage embeddings."""
    indexer_batch_size: int = 128
    """Passages per batch when indexing."""
    indexer_log_interval: int = 1000
    """Batches between log lines when indexing."""


@dataclass(kw_only=True)
class InferenceConfig:
    """Engines that generate text."""

    inference_batch_times_seqlen_threshold: int = -1
    """Split batches larger than this in pipelined inference; -1 never does."""
    max_tokens_to_oom: int = 12000
    """Refuse requests of more tokens."""
    output_bert_embeddings: bool = False
    """BERT returns pooled embeddings."""
    bert_embedder_type: Literal["megatron", "huggingface"] = "megatron"
    """Which BERT computes them."""
    inference_max_batch_size: int = 8
    """Requests that run at once."""
    inference_max_seq_length: int = 2560
    """Longest prompt and output together."""
    inference_dynamic_batching: bool = False
    """Let requests join and leave the running batch."""
    inference_dynamic_batching_buffer_size_gb: float = 40.0
    """Gigabytes for the paged key/value cache."""
    inference_dynamic_batching_chunk_size: int = 256
    """Tokens per page."""
    inference_dynamic_batching_buffer_guaranteed_fraction: float = 0.2
    """Share of the pages that running requests are sure of."""
    inference_dynamic_batching_buffer_overflow_factor: float | None = None
    """Overbooking of requests and tokens."""
    inference_dynamic_batching_max_requests_override: int | None = None
    """Fixed limit of requests."""
    inference_dynamic_batching_max_tokens_override: int | None = None
    """Fixed limit of tokens."""
    nccl_all_reduce_for_prefill: bool = False
    """Prefill with NCCL's all-reduce."""


@dataclass(kw_only=True)
class RetroConfig:
    """Training with retrieved neighbours."""

    retro_project_dir: str | None = None
    """Folder with the preprocessed data."""
    retro_add_retriever: bool = False
    """Give the model its retrieval layers."""
    retro_cyclic_train_iters: int | None = None
    """Steps when the data repeats."""
    retro_encoder_layers: int = 2
    """Layers of the neighbour encoder."""
    retro_encoder_hidden_dropout: float = 0.1
    """Hidden dropout of the neighbour encoder."""
    retro_encoder_attention_dropout: float = 0.1
    """Attention dropout of the neighbour encoder."""
    retro_num_neighbors: int = 2
    """Neighbours per chunk."""
    retro_num_retrieved_chunks: int = 2
    """Chunks per neighbour."""
    retro_attention_gate: float = 1
    """Gate on the cross attention."""
    retro_verify_neighbor_count: bool = True
    """Check that neighbours and data set have the same length."""


@dataclass(kw_only=True)
class ExportConfig:
    """Quantization and distillation with the modelopt package."""

    export_model_type: Literal["GPTModel", "MambaModel"] = "GPTModel"
    """Class of the model."""
    export_te_mcore_model: bool = False
    """The checkpoint has the layout of Transformer Engine layers."""
    export_force_local_attention: bool = False
    """Use this library's attention."""
    export_quant_cfg: (
        Literal[
            "int8_sq",
            "fp8",
            "fp8_real_quant",
            "fp8_blockwise",
            "fp8_blockwise_real_quant",
            "fp8_blockwise_32",
            "int4_awq",
            "w4a8_awq",
            "nvfp4",
        ]
        | None
    ) = None
    """Quantization recipe."""
    export_kd_cfg: str | None = None
    """Distillation settings."""
    export_kd_teacher_load: str | None = None
    """The teacher's checkpoint."""
    finetune_hf_dataset: str | None = None
    """Data set on the hub to fine-tune on."""
    export_qk_l2_norm: bool = False
    """Query and key norm of Llama 4."""
    export_moe_apply_probs_on_input: bool = False
    """Expert scaling of Llama 4."""


@dataclass(kw_only=True)
class VisionLanguageConfig:
    """Training of vision-language models."""

    freeze_LM: bool = False
    """Leave the language model as it is."""
    freeze_ViT: bool = False
    """Leave the vision model as it is."""
    disable_vision_class_token: bool = False
    """Drop the vision model's class token."""
    dataloader_seq_length: int | None = None
    """Tokens per sample as the loader gives them."""
    decoder_tp_comm_overlap: bool = False
    """Overlap tensor parallel communication in the decoder only."""
    use_packed_sequence: bool = False
    """Pack samples instead of padding them."""
