"""The former name of `TextGenerationController`."""

from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController as SimpleTextGenerationController,
)

__all__ = ["SimpleTextGenerationController"]
