"""GET /metrics, in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = {
    "requests_total": ("counter", "requests taken"),
    "requests_completed_total": ("counter", "requests that came to their end"),
    "requests_cancelled_total": ("counter", "requests whose client went away, or that met a stop text"),
    "requests_rejected_total": ("counter", "requests refused because too many waited"),
    "prompt_tokens_total": ("counter", "tokens of prompts"),
    "generated_tokens_total": ("counter", "tokens generated"),
    "passes_total": ("counter", "passes of the model"),
    "busy_seconds_total": ("counter", "seconds in passes"),
    "requests_running": ("gauge", "requests in the context"),
    "requests_waiting": ("gauge", "requests that wait for room"),
    "chunks_free": ("gauge", "free chunks of the cache"),
    "chunks_remembered": ("gauge", "chunks that only the cache of beginnings holds"),
    "chunks": ("gauge", "chunks of the cache"),
    "first_token_seconds_median": ("gauge", "of the last 1000 requests"),
}
"""What `EngineLoop.samples` gives: the kind of each number, and what it is."""


def exposition(samples: Sequence[dict[str, float]]) -> str:
    """Each number with its help and kind; with a label where there are several copies of the model."""
    lines = []
    for name, (kind, words) in KINDS.items():
        if name not in samples[0]:  # a model that keeps nothing has no chunks
            continue
        lines += [f"# HELP megatron_{name} {words}", f"# TYPE megatron_{name} {kind}"]
        for number, values in enumerate(samples):
            label = f'{{replica="{number}"}}' if len(samples) > 1 else ""
            lines.append(f"megatron_{name}{label} {values[name]}")
    return "\n".join(lines) + "\n"
