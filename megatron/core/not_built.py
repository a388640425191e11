"""Configuration fields of capabilities that do not exist yet: set, they are refused rather than ignored."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

FIELDS_NOT_BUILT: dict[str, str] = {
    "moe_enable_deepep": "the kernels of DeepEP",
    "moe_router_padding_for_fp8": "routing that pads; products in fp8 pad for themselves",
    "heterogeneous_block_specs": "heterogeneous layers",
    "mrope_section": "multimodal rotary positions",
    "tp_comm_atomic_ag": "atomic kernels of the vendor's user buffers",
    "tp_comm_atomic_rs": "atomic kernels of the vendor's user buffers",
    "num_microbatches_with_partial_activation_checkpoints": "partial recompute by microbatch",
    "use_te_rng_tracker": "Transformer Engine",
    "fp8_dot_product_attention": "attention in fp8",
    "fp8_multi_head_attention": "attention in fp8",
    "reuse_grad_buf_for_mxfp8_param_ag": "weights kept in mxfp8",
    "use_kitchen": "custom quantization recipes",
    "quant_recipe": "custom quantization recipes",
    "external_cuda_graph": "graphs captured by the program; enable_cuda_graph has the layers captured",
    "cuda_graph_scope": "parts of a layer captured; enable_cuda_graph captures whole layers",
    "cuda_graph_use_single_mempool": "one memory pool for all graphs; each captured pass has its own",
    "cuda_graph_retain_backward_graph": "a second backward of a captured layer",
    "flash_decode": "flash-attn's kernel for decoding: the engine's own attention splits the keys",
    "inference_rng_tracker": "a random state for inference: each request draws from one of its own",
    "symmetric_ar_type": "all-reduce in symmetric memory",
    "use_custom_fsdp": "fully sharded data parallelism other than torch's (TorchFullyShardedDataParallel)",
    "data_parallel_sharding_strategy": "fully sharded data parallelism other than torch's",
    "fsdp_double_buffer": "fully sharded data parallelism other than torch's",
    "nccl_ub": "registered NCCL buffers",
}
"""Field of a core configuration class -> what it would switch on. A row goes when its capability arrives."""


def refuse_fields_not_built(config: Any) -> None:
    """A setting that nothing reads yet must not look as if it worked.

    Raises:
        NotImplementedError: a field of `FIELDS_NOT_BUILT` is in use.
    """
    for field in fields(config):
        capability = FIELDS_NOT_BUILT.get(field.name)
        if capability is None or field.default is MISSING:
            continue
        value = getattr(config, field.name)
        used = value if isinstance(value, bool) else value != field.default
        if used:
            raise NotImplementedError(f"{field.name} ({value}): {capability} is not built yet; leave it unset")
