"""Which flags a server's context follows."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron.inference.context_of_flags import context_settings
from megatron.training.capabilities import ARGUMENTS_OF_SERVER, refuse_capabilities_not_built
from megatron.training.settings import ConfigurationError, Settings, Source

DEFAULTS = {
    "max_position_embeddings": 1024,
    "cache_gb": 1.0,
    "cache_chunk_size": 64,
    "max_running": 64,
    "inference_max_seq_length": 2560,
    "inference_max_batch_size": 8,
    "inference_dynamic_batching_buffer_size_gb": 40.0,
    "inference_dynamic_batching_buffer_guaranteed_fraction": 0.2,
    "inference_dynamic_batching_buffer_overflow_factor": None,
    "inference_dynamic_batching_chunk_size": 256,
    "inference_dynamic_batching_max_requests_override": None,
    "inference_dynamic_batching_max_tokens_override": None,
}


def settings(**given: Any) -> Settings:
    args = Settings(**DEFAULTS)
    args.remember_defaults()
    for name, value in given.items():
        args.put(name, value, Source("flag", name))
    return args


def test_the_servers_own_flags_are_for_small_machines() -> None:
    found = context_settings(settings(cache_gb=2.0, max_running=5))
    assert found["max_sequence_length"] == 1024 and found["buffer_size_gb"] == 2.0
    assert found["max_requests_override"] == 5 and found["max_tokens_override"] == 2048
    assert found["buffer_overflow_factor"] is None and found["chunk_size_tokens"] == 64


@pytest.mark.parametrize(
    ("flag", "value", "setting"),
    [
        ("inference_max_seq_length", 512, "max_sequence_length"),
        ("inference_max_batch_size", 8, "max_requests_override"),
        ("inference_dynamic_batching_buffer_size_gb", 40.0, "buffer_size_gb"),
        ("inference_dynamic_batching_buffer_guaranteed_fraction", 0.2, "buffer_guaranteed_fraction"),
        ("inference_dynamic_batching_buffer_overflow_factor", 1.5, "buffer_overflow_factor"),
        ("inference_dynamic_batching_chunk_size", 256, "chunk_size_tokens"),
        ("inference_dynamic_batching_max_requests_override", 3, "max_requests_override"),
        ("inference_dynamic_batching_max_tokens_override", 300, "max_tokens_override"),
    ],
)
def test_what_was_given_counts_even_if_it_is_the_default(flag: str, value: Any, setting: str) -> None:
    assert context_settings(settings(**{flag: value}))[setting] == value


def test_texts_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="2560.*1024"):
        context_settings(settings(inference_max_seq_length=2560))


def test_only_the_server_reads_them() -> None:
    given = argparse.Namespace(inference_dynamic_batching=True, inference_max_batch_size=4)
    assert vars(given).keys() <= set(ARGUMENTS_OF_SERVER)
    with pytest.raises(ConfigurationError, match="--inference-dynamic-batching: only tools/run_text") as refusal:
        refuse_capabilities_not_built(given)
    assert "--inference-max-requests" in str(refusal.value)
    given.serves_texts = True
    refuse_capabilities_not_built(given)
