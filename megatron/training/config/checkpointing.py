"""What is saved, where, in which format, and what is loaded from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving, loading and formats of checkpoints."""

    save: str | None = None
    """Folder to save checkpoints to."""
    save_interval: int | None = None
    """Steps between checkpoints."""
    save_retain_interval: int | None = None
    """Keep the checkpoints of multiples of this many steps, and remove others as newer ones are saved."""
    save_keep_last: int | None = None
    """Keep this many of the newest checkpoints, and remove older ones as newer ones are saved."""
    no_save_optim: bool | None = None
    """Leave the optimizer's state out of checkpoints."""
    no_save_rng: bool | None = None
    """Leave random states out of checkpoints."""
    save_hf: str | None = None
    """Directory to write the final model to in the form of Hugging Face transformers."""
    hf_model_type: str | None = None
    """Kind of model that --save-hf writes (llama, mistral, ...); default: the first that computes the same."""
    load: str | None = None
    """Folder to load a checkpoint from; hf:DIR is a directory of Hugging Face transformers."""
    no_load_optim: bool | None = None
    """Do not load the optimizer's state."""
    no_load_rng: bool | None = None
    """Do not load random states."""
    non_persistent_save_interval: int | None = None
    """Steps between checkpoints that are kept only until the next one."""
    non_persistent_ckpt_type: Literal["global", "local", "in_memory"] | None = None
    """Where those lie."""
    non_persistent_global_ckpt_dir: str | None = None
    """Shared folder for them."""
    non_persistent_local_ckpt_dir: str | None = None
    """Folder of each node for them."""
    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = "fully_parallel"
    """How ranks share the work of writing them."""
    finetune: bool = False
    """Load weights only, and count iterations from zero."""
    pretrained_checkpoint: str | None = None
    """Folder (or hf:DIR) to load weights from when --load holds no checkpoint."""
    ckpt_step: int | None = None
    """Load the checkpoint of this iteration instead of the latest."""
    use_checkpoint_args: bool = False
    """Take the model's settings from the checkpoint."""
    use_mp_args_from_checkpoint_args: bool = False
    """Take the parallel sizes from the checkpoint too."""
    use_tokenizer_model_from_checkpoint_args: bool = True
    """Take the tokenizer's file from the checkpoint too."""
    exit_on_missing_checkpoint: bool = False
    """Stop when --load holds no checkpoint, rather than start from scratch."""
    use_persistent_ckpt_worker: bool = False
    """Write asynchronous checkpoints from one process that stays."""
    auto_detect_ckpt_format: bool = False
    """Recognise the format of the checkpoint that is loaded."""
    ckpt_format: Literal["torch", "torch_dist", "zarr", "torch_dcp", "safetensors"] = "torch_dist"
    """Format of checkpoints; torch_dist and safetensors load into any parallel layout."""
    ckpt_verify: Literal["checksums", "sizes"] = "checksums"
    """What of a checkpoint's files is compared with its manifest before it is loaded."""
    ckpt_convert_format: Literal["torch", "torch_dist", "safetensors", "zarr"] | None = None
    """Convert the loaded checkpoint to this format and stop."""
    ckpt_convert_save: str | None = None
    """Folder for the converted checkpoint, which lies in a folder of the format's name in it."""
    ckpt_convert_update_legacy_dist_opt_format: bool = False
    """Read the distributed optimizer's state of a checkpoint of format torch from before February 2024."""
    ckpt_fully_parallel_save_deprecated: bool = False
    """No effect: saving is shared among data parallel ranks anyway."""
    ckpt_fully_parallel_save: bool = True
    """Share saving among data parallel ranks."""
    async_save: bool | None = None
    """Write checkpoints while training goes on."""
    async_strategy: Literal["mcore", "thread", "nvrx"] = "mcore"
    """Who writes them: a process beside each rank, a thread in it, or the package nvidia_resiliency_ext."""
    ckpt_fully_parallel_load: bool = False
    """Share reading among data parallel ranks, who then exchange what they read."""
    ckpt_assume_constant_structure: bool = False
    """Plan the first save only and reuse the plan."""
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = "assume_ok_unexpected"
    """What to do about keys that the checkpoint lacks or has in excess."""
    load_model_opt_format: bool = False
    """Load a checkpoint with the state of the modelopt package."""
