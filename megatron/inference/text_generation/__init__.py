"""Texts from a trained model.

- `generation.generate` continues tokens, under every layout.
- `api` takes prompts as texts, on one of the ranks, and gives texts.
- `mcore_engine_server` does so with an engine.
"""

from .api import beam_search_and_post_process, generate_and_post_process
from .generation import generate

__all__ = ["beam_search_and_post_process", "generate", "generate_and_post_process"]
